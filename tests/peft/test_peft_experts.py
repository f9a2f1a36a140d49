"""RandLoraConfig(target_parameters=...): full-rank adapters of fused experts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compile_helpers import assert_steps_agree, graphs, needs_compiler
from compile_helpers import fresh_dynamo as fresh_dynamo
from expert_models import EXPERTS, MODELS, SIZES, batch, logits, make, train, transformers
from layer_cases import delta_by_reference
from layer_helpers import input_scale_of, normalized
from peft_helpers import (
    accelerated,
    adapted,
    assert_unchanged,
    config,
    layers,
    numbers,
    peft,
    randomize,
    relative,
    scales,
)
from safetensors.torch import load_file

from randlora_ext import apply_randlora, calibrate
from randlora_ext.nn.adapter_record import RECORD_KEY

pytestmark = pytest.mark.filterwarnings("ignore:.*(checkpointing|use_reentrant)")


def moe(name="Mixtral", seed=0, **options):
    default = {"basis": "hadamard", "target_parameters": EXPERTS, "targets": []}
    options = default | options
    return adapted(make(name), r=4, seed=seed, **options)


def wrappers(model):
    """Outer and inner layers, of down_proj and gate_up_proj, of the last block."""
    outer = model.base_model.model.model.layers[-1].mlp.experts
    return outer, outer.base_layer


def oracle(layer):
    """dW of each expert by the reference, as the parameter is stored."""
    basis, scaling = layer.basis_of("default", torch.device("cpu")), layer.scaling["default"]
    each = zip(layer.randlora_lambda["default"], layer.randlora_gamma["default"], strict=True)
    dW = [delta_by_reference(basis, *(t.double() for t in e), scaling) for e in each]
    return torch.stack([d.T if layer.transposed else d for d in dW])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_numbers(name, tmp_path):
    model, base = moe(name), make(name)
    plain = logits(base)
    told = accelerated.kernel_summary(model)
    assert "gate_up_proj of 4 experts" in told and "plain" not in told
    y = logits(model)
    assert (y - plain).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    before = numbers(model)
    merged = [layer._base_weight() + oracle(layer).float() for layer in wrappers(model)]
    model.merge_adapter(safe_merge=True)
    assert (logits(model) - y).abs().max() < 1e-5 * y.abs().max()
    for layer, weight in zip(wrappers(model), merged, strict=True):
        assert layer.get_base_layer().is_transposed == (name == "GptOss")
        assert torch.allclose(layer._base_weight(), weight, atol=1e-5)
    model.unmerge_adapter()
    assert_unchanged(model, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(make(name), tmp_path)), y)
    unloaded = model.merge_and_unload()
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert (logits(unloaded) - y).abs().max() < 1e-5 * y.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_training(name):
    accelerated.enable()
    options = {"basis": "hadamard", "target_parameters": EXPERTS, "randlora_alpha": 80}
    chosen = config(4, accelerated.RandLoraConfig, [], **options)
    model = peft.get_peft_model(make(name), chosen)
    checkpointed = copy.deepcopy(model)
    checkpointed.base_model.model.gradient_checkpointing_enable()
    checkpointed.enable_input_require_grads()
    losses = train(model)
    assert losses[-1] < losses[0] / 3
    assert train(checkpointed, 3) == pytest.approx(losses[:3], rel=1e-5)


def test_several_adapters(tmp_path):
    model = moe(seed=1)
    one = logits(model)
    model.save_pretrained(tmp_path)
    bases = dict(basis="hadamard", projection_prng_key=7, target_parameters=EXPERTS[::-1])
    model.add_adapter("two", config(8, accelerated.RandLoraConfig, [], **bases))
    assert torch.equal(logits(model), one)
    model.set_adapter("two")
    assert torch.equal(logits(model), logits(make("Mixtral")))
    randomize(model, 2)
    two = logits(model)
    model.set_adapter("default")
    assert not torch.equal(logits(model), one)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), one)
    model.base_model.set_adapter(["default", "two"])
    both = logits(model)
    model.merge_adapter()
    assert (logits(model) - both).abs().max() < 1e-5 * both.abs().max()
    model.unmerge_adapter()
    model.load_adapter(tmp_path, "three")
    model.set_adapter("three")
    assert torch.equal(logits(model), one)
    accelerated.hotswap_adapter(model, tmp_path, "three")
    model.delete_adapter("default")
    model.set_adapter("two")
    assert torch.equal(logits(model), two)


@pytest.mark.parametrize("low", [False, True])
def test_beside_linear_layers_and_opened_by_transformers_classes(tmp_path, low):
    model = moe("Qwen3Moe", targets=["q_proj"], task_type="CAUSAL_LM")
    y = logits(model)
    make("Qwen3Moe").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    by_class = peft.AutoPeftModelForCausalLM.from_pretrained
    opened = by_class(tmp_path / "adapter", low_cpu_mem_usage=low)
    assert torch.equal(logits(opened), y)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {key.split("mlp.")[1]: value.shape for key, value in saved.items() if "0.mlp" in key}
    records = [shapes.pop(key) for key in list(shapes) if key.endswith(RECORD_KEY)]
    assert len(records) == 2
    assert shapes == {  # as PEFT's LoRA: the parameter found first is inside
        "experts.base_layer.randlora_lambda": (4, 4, 8),
        "experts.base_layer.randlora_gamma": (4, 8, 32),
        "experts.base_layer.randlora_input_scale": (4, 32),
        "experts.randlora_lambda": (4, 4, 6),
        "experts.randlora_gamma": (4, 6, 24),
        "experts.randlora_input_scale": (4, 24),
    }


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_gradients(name, implementation):
    model = moe(name)
    model.base_model.model.config._experts_implementation = implementation
    merged, token = copy.deepcopy(model), torch.tensor([[3]])
    merged.merge_adapter()
    for one in (model, merged):
        for layer in wrappers(merged):
            layer._base_weight().requires_grad_(True)
        one(input_ids=token).logits.square().sum().backward()
    for layer, of in zip(wrappers(model), wrappers(merged), strict=True):
        diagonals = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
        wanted = torch.autograd.grad(oracle(layer), diagonals, of._base_weight().grad.double())
        for parameter, want in zip(diagonals, wanted, strict=True):
            assert relative(parameter.grad, want) < 1e-5
            visited = parameter.grad.flatten(1).any(1)
            assert visited.sum() == 2  # of four experts


@needs_compiler
def test_compiled_in_one_graph(fresh_dynamo):
    model = moe("GptOss").train()
    eager = copy.deepcopy(model)
    tokens = batch()["input_ids"]
    assert_steps_agree(torch.compile(model), eager, tokens, 1e-4)
    assert graphs() == 1


ERRORS = [
    ({"basis": "peft"}, ValueError, 'need basis="hadamard".*got basis=.peft'),
    ({"randlora_dropout": 0.1}, ValueError, "and randlora_dropout=0, got .*=0.1"),
    ({"target_parameters": "experts"}, TypeError, "target_parameters must be a list of texts"),
    ({"target_parameters": ["expert.up"]}, ValueError, "matches no parameter .*gate_up"),
    ({"targets": ["nothing"]}, ValueError, "target_modules .*nothing.* matches no linear layer"),
]


@pytest.mark.parametrize("options, error, told", ERRORS)
def test_refused_configurations(options, error, told):
    with pytest.raises(error, match=told):
        moe(**options)


def test_names_of_tensors_alone_do_not_say_the_parameter(tmp_path):
    one, other = (moe(target_parameters=[name]) for name in EXPERTS)  # of equal shapes
    one.save_pretrained(tmp_path)
    before = numbers(other)
    with pytest.raises(ValueError, match="its target_parameters are .*gate_up.*, not .*down"):
        accelerated.hotswap_adapter(other, tmp_path)
    with pytest.raises(RuntimeError, match="target_parameters of the tensors is .*gate_up.*, not"):
        other.load_adapter(tmp_path, "default")
    assert_unchanged(other, before)


def test_without_target_modules():
    """As PEFT's LoRA: a model that PEFT does not know has experts alone, others the usual ones."""
    accelerated.enable()
    for name, count in (("Qwen3Moe", 4), ("Mixtral", 8)):
        chosen = {"basis": "hadamard", "target_parameters": EXPERTS}
        model = peft.get_peft_model(make(name), accelerated.RandLoraConfig(r=4, **chosen))
        assert len(layers(model)) == count


def test_refused_uses(tmp_path):
    model, more = moe(), {"basis": "hadamard", "target_parameters": EXPERTS[:1]}
    with pytest.raises(ValueError, match="target_parameters must be .*down_proj.* of adapter"):
        model.add_adapter("two", config(4, accelerated.RandLoraConfig, [], **more))
    with pytest.raises(ValueError, match="stock PEFT lacks; merge instead"):
        accelerated.export_to_peft(model, tmp_path)
    with pytest.raises(TypeError, match="do not support LoRA conversion.*ParamWrapper"):
        peft.convert_to_lora(model, rank=4)
    with pytest.raises(ValueError, match="adapter_names cannot choose among adapters of target_p"):
        model.eval()(**batch(), adapter_names=["default"] * 2)
    with pytest.raises(RuntimeError, match="torch.jit.trace cannot record"):
        torch.jit.trace(wrappers(model)[0], torch.ones(2, 32))


@pytest.mark.parametrize("name", MODELS)
def test_calibrated(name, tmp_path):
    """A vector for each expert, the same however the experts are computed."""
    model = randomize(moe(name, targets=["q_proj"] if name == "Mixtral" else []), size=0)
    model.set_experts_implementation("eager")
    many = {"input_ids": batch()["input_ids"].repeat(8, 1)}
    calibrate(model, [many])
    found = scales(model)
    model.set_experts_implementation("grouped_mm")
    calibrate(model, [many])
    for one, other, layer in zip(found, scales(model), layers(model), strict=True):
        assert one.shape == (*layer.experts, layer.in_features)
        assert not layer.experts or not torch.equal(one[0], one[1])
        torch.testing.assert_close(one, other)
    model.set_experts_implementation("batched_mm")  # copies the matrices that it multiplies by
    with pytest.warns(UserWarning, match="batches brought no token.*stay as they were: .*experts"):
        calibrate(model, [many])
    y = logits(randomize(model))
    model.save_pretrained(tmp_path)
    opened = peft.PeftModel.from_pretrained(make(name), tmp_path)
    assert all(map(torch.equal, scales(opened), scales(model)))
    torch.testing.assert_close(logits(opened), y)
    with pytest.raises(ValueError, match=r"has trained .its lambda is not zero"):
        calibrate(model, [many])


class Mixture(torch.nn.Module):
    """Experts that multiply in the given way, over a linear layer of their own."""

    def __init__(self, multiply):
        super().__init__()
        self.multiply, self.up = multiply, torch.nn.Parameter(torch.randn(3, 24, 24))
        self.linear = torch.nn.Linear(24, 24)

    def forward(self, x):
        return self.multiply(self.linear(x), self.up)


def mixture(multiply):
    torch.manual_seed(0)
    chosen = {"basis": "hadamard", "target_parameters": ["0.up"]}
    return randomize(
        adapted(torch.nn.Sequential(Mixture(multiply)), ["linear"], 4, **chosen), size=0
    )


WAYS = {
    "matmul": lambda h, up: h @ up.mT,
    "four dimensions": lambda h, up: h[None, :, None].transpose(1, 2) @ up.mT,
    "vectors": lambda h, up: [[F.linear(row, w) for row in h] for w in up],
    "keywords": lambda h, up: [F.linear(input=h, weight=w) for w in up],
    "halves": lambda h, up: [
        h @ up[e, rows].T for e in range(3) for rows in (slice(0, 12), slice(12, 24))
    ],
    "padded": lambda h, up: torch.bmm(F.pad(h, (0, 0, 0, 9)).expand(3, -1, -1), up.mT),
}


@pytest.mark.parametrize("way", WAYS)
def test_however_experts_multiply(way):
    model, x = mixture(WAYS[way]), torch.randn(50, 24) * (torch.rand(24) + 0.1)
    calibrate(model, [(x,)])
    layer = model.base_model.model[0]
    h = layer.get_base_layer().linear.base_layer(x)
    for scale in layer.randlora_input_scale["default"]:
        torch.testing.assert_close(normalized(scale), input_scale_of(h))
    assert layer.get_base_layer().linear.is_calibrated("default")


@pytest.mark.parametrize(
    "multiply",
    [
        lambda h, up: h @ up,  # by the other side of a square parameter
        lambda h, up: torch.func.vmap(torch.matmul)(h[:, None], up[:1].expand(len(h), -1, -1)),
        lambda h, up: torch.einsum("ti,eoi->teo", h, up),
        lambda h, up: h[0] * up,
    ],
    ids=["other side", "vmap", "einsum", "elementwise"],
)
def test_what_is_no_product_with_the_parameter_is_told(multiply):
    model = mixture(multiply)
    with pytest.warns(
        UserWarning, match="batches brought no token.*stay as they were: .*'base_model.model.0.up'"
    ):
        calibrate(model, [(torch.randn(50, 24),)])


def test_llama_4_stores_experts_transposed_and_does_not_say_so():
    config = transformers.Llama4TextConfig(
        **SIZES | {"intermediate_size": 16, "num_experts_per_tok": 1},
        intermediate_size_mlp=32, num_local_experts=4, head_dim=8, interleave_moe_layer_step=1,
    )  # fmt: skip
    base = transformers.Llama4ForCausalLM(config)
    chosen = {"basis": "hadamard", "target_parameters": EXPERTS}
    model = randomize(adapted(base, [], 4, **chosen), size=0)
    calibrate(model, [{"input_ids": batch()["input_ids"].repeat(8, 1)}])
    scales = [each.randlora_input_scale["default"] for each in layers(model)]
    sizes = [
        (each.transposed, *scale.shape) for each, scale in zip(layers(model), scales, strict=True)
    ]
    assert sizes == [(True, 4, 16), (True, 4, 32)] * 2
    y = logits(randomize(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), y, rtol=0, atol=1e-4)


def test_a_parameter_below_a_module_called_base_layer():
    net = torch.nn.Sequential(torch.nn.ModuleDict({"base_layer": Mixture(WAYS["matmul"])}))
    with pytest.raises(ValueError, match="'0.base_layer.up' lies in a module called 'base_layer'"):
        adapted(net, [], 4, basis="hadamard", target_parameters=["up"])
    assert not layers(net)
    apply_randlora(net, target_parameters=["up"], r=4)
    assert type(net[0]["base_layer"]).__name__ == "RandLoraParameter"


def test_a_parameter_inside_a_module_with_another():
    net, both = torch.nn.Sequential(Mixture(WAYS["matmul"])), ["0.up", "0.linear.weight"]
    with pytest.raises(ValueError, match="'0.linear.weight' lies inside '0', of which a parameter"):
        adapted(net, [], 4, basis="hadamard", target_parameters=both)
    assert not layers(net)
    apply_randlora(net, target_parameters=both, r=4)
    randomize(net)
    net(torch.randn(5, 24)).sum().backward()
    grads = [p.grad for name, p in net.named_parameters() if "randlora_" in name]
    assert len(grads) == 4 and all(bool(grad.any()) for grad in grads)


def test_batches_may_be_made_by_other_mixtures():
    model, other = mixture(WAYS["matmul"]), randomize(mixture(WAYS["matmul"]))
    x = torch.randn(50, 24)
    want = other(x)

    def batches():
        assert torch.equal(other(x), want)
        model(torch.randn(50, 24) * 100)  # is not counted
        yield (x,)

    calibrate(model, batches())
    layer = model.base_model.model[0]
    h = layer.get_base_layer().linear.base_layer(x)
    scale = layer.randlora_input_scale["default"][0]
    torch.testing.assert_close(normalized(scale), input_scale_of(h))


def test_an_expert_that_sees_few_tokens_takes_the_vector_of_all():
    def routed(h, up):
        return [rows @ w.T for rows, w in zip(h.split([40, 50, 31]), up, strict=True)]

    model, x = mixture(routed), torch.randn(121, 24) * (torch.rand(24) + 0.1)
    layer = model.base_model.model[0]
    calibrate(torch.compile(layer), [(x,)])
    h = layer.get_base_layer().linear.base_layer(x)
    want = torch.stack([input_scale_of(h[:40]), input_scale_of(h[40:90]), input_scale_of(h)])
    torch.testing.assert_close(normalized(layer.randlora_input_scale["default"]), want)


def test_a_matrix_beside_stacked_experts():
    """(out, in) is one expert; a module that says nothing stores (experts, out, in)."""
    torch.manual_seed(0)
    own = Mixture(lambda h, up: torch.einsum("ti,eoi->to", h, up) @ own.matrix.T)
    own.matrix = torch.nn.Parameter(torch.randn(8, 24))
    net = torch.nn.Sequential(own.bfloat16())
    chosen = {"basis": "hadamard", "target_parameters": ["0.matrix", "0.up"]}
    model, x = adapted(net, [], 4, **chosen), torch.randn(5, 24, dtype=torch.bfloat16)
    y, (outer, inner) = model(x), (net[0], net[0].base_layer)
    assert (outer.experts, inner.experts) == ((1,), (3,))
    with torch.no_grad():
        for layer in (outer, inner):
            weight = layer._base_weight()
            assert layer.randlora_lambda["default"].dtype == torch.float32
            weight.copy_(weight.double() + oracle(layer).view(weight.shape))
    assert relative(y, own(x)) < 1e-2
