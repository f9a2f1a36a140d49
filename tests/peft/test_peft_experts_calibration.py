"""`calibrate` on fused experts under PEFT: a vector for each expert and one strength for all of a
layer, however they multiply."""

import pytest
import torch
from compile_helpers import fresh_dynamo as fresh_dynamo
from expert_models import EXPERTS, MODELS, SIZES, batch, logits, make, transformers
from layer_helpers import input_scale_of, normalized, strengths_of
from peft_experts import WAYS, mixture, moe
from peft_helpers import (
    adapted,
    layers,
    opened,
    randomize,
    relative,
    scales,
)
from torch.nn import functional

from randlora_ext import calibrate
from randlora_ext.own_text import own_text

MANY = {"input_ids": batch()["input_ids"].repeat(8, 1)}


def untrained(name):
    """In Mixtral beside linear layers."""
    return randomize(moe(name, targets=["q_proj"] if name == "Mixtral" else []), size=0)


def calibrated(name, implementation):
    model = untrained(name)
    model.set_experts_implementation(implementation)
    calibrate(model, [MANY])
    return model


@pytest.mark.parametrize("name", MODELS)
def test_each_expert_has_a_vector(name):
    model = calibrated(name, "eager")
    for scale, layer in zip(scales(model), layers(model), strict=True):
        assert scale.shape == (*layer.experts, layer.in_features)
        assert not layer.experts or not torch.equal(scale[0], scale[1])


@pytest.mark.parametrize("name", MODELS)
def test_the_vectors_do_not_depend_on_how_experts_are_computed(name):
    ways = (scales(calibrated(name, way)) for way in ("eager", "grouped_mm"))
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_experts_that_are_copied_before_the_product_are_told(name):
    model = untrained(name)
    model.set_experts_implementation("batched_mm")
    with pytest.warns(UserWarning, match="batches brought no token.*stay as they were: .*experts"):
        calibrate(model, [MANY])


@pytest.mark.parametrize("name", MODELS)
def test_the_vectors_are_saved(name, tmp_path):
    model = randomize(calibrated(name, "eager"))
    model.save_pretrained(tmp_path)
    again = opened(tmp_path, lambda: make(name))
    again.set_experts_implementation("eager")
    assert all(map(torch.equal, scales(again), scales(model)))
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_adapter_is_refused(name):
    with pytest.raises(ValueError, match=r"has trained .its lambda is not zero"):
        calibrate(randomize(moe(name)), [MANY])


def up(model):
    """The adapters of the mixture's parameter."""
    return model.base_model.model[0].adapters["up"]


def inputs_of_experts(model, x):
    """What the mixture multiplies by its experts."""
    return model.base_model.model[0].base_layer.linear.base_layer(x)


@pytest.mark.parametrize("way", WAYS)
def test_however_experts_multiply(way):
    model, x = mixture(WAYS[way]), torch.randn(50, 24) * (torch.rand(24) + 0.1)
    calibrate(model, [(x,)])
    want = input_scale_of(inputs_of_experts(model, x))
    for scale in up(model).randlora_input_scale["default"]:
        torch.testing.assert_close(normalized(scale), want)


def test_the_linear_layer_inside_a_mixture_is_calibrated_too():
    model = mixture(WAYS["matmul"])
    calibrate(model, [(torch.randn(50, 24),)])
    linear = model.base_model.model[0].base_layer.linear
    assert linear.is_calibrated("default")


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


@pytest.fixture
def llama_4():
    """It stores experts transposed, and does not say so."""
    settings = transformers.Llama4TextConfig(
        **SIZES | {"intermediate_size": 16, "num_experts_per_tok": 1},
        intermediate_size_mlp=32, num_local_experts=4, head_dim=8, interleave_moe_layer_step=1,
    )  # fmt: skip
    base = transformers.Llama4ForCausalLM(settings)
    chosen = {"basis": "hadamard", "target_parameters": EXPERTS}
    model = randomize(adapted(base, [], 4, **chosen), size=0)
    calibrate(model, [MANY])
    return model


def test_of_llama_4_inputs_and_outputs_are_told_apart(llama_4):
    sizes = [
        (layer.transposed, *scale.shape)
        for layer, scale in zip(layers(llama_4), scales(llama_4), strict=True)
    ]
    assert sorted(sizes) == sorted([(True, 4, 16), (True, 4, 32)] * 2)


def test_llama_4_is_merged(llama_4):
    y = logits(randomize(llama_4))
    assert relative(logits(llama_4.merge_and_unload()), y) < 1e-5


def test_batches_may_be_made_by_other_mixtures():
    """Neither these nor calls between the batches are counted."""
    model, other = mixture(WAYS["matmul"]), randomize(mixture(WAYS["matmul"]))
    x = torch.randn(50, 24)

    def batches():
        other(x)
        model(torch.randn(50, 24) * 100)
        yield (x,)

    calibrate(model, batches())
    scale = up(model).randlora_input_scale["default"][0]
    torch.testing.assert_close(normalized(scale), input_scale_of(inputs_of_experts(model, x)))


def test_a_mixture_computes_as_ever_while_another_is_calibrated():
    model, other = mixture(WAYS["matmul"]), randomize(mixture(WAYS["matmul"]))
    x = torch.randn(50, 24)
    want = other(x)
    meanwhile = []

    def batches():
        meanwhile.append(other(x))
        yield (x,)

    calibrate(model, batches())
    assert len(meanwhile) > 0 and all(torch.equal(y, want) for y in meanwhile)


def test_an_expert_that_sees_few_tokens_takes_the_vector_of_all():
    def routed(h, up):
        return [rows @ w.T for rows, w in zip(h.split([40, 50, 31]), up, strict=True)]

    model, x = mixture(routed), torch.randn(121, 24) * (torch.rand(24) + 0.1)
    layer = model.base_model.model[0]
    calibrate(torch.compile(layer), [(x,)])
    h = layer.base_layer.linear.base_layer(x)
    want = torch.stack([input_scale_of(h[:40]), input_scale_of(h[40:90]), input_scale_of(h)])
    torch.testing.assert_close(normalized(up(model).randlora_input_scale["default"]), want)


def products_of(model, name, batches, monkeypatch):
    """Of each expert of a parameter (experts, out, in) its inputs, and the gradients of the summed
    loss to its outputs, by autograd in float64."""
    weight = model.get_parameter(name)
    seen: dict = {expert: [] for expert in range(len(weight))}
    linear = functional.linear

    def watching(x, w, *bias):
        y = linear(x, w, *bias)
        if w.data_ptr() in pointers:
            y.retain_grad()
            seen[pointers.index(w.data_ptr())].append((x.detach(), y))
        return y

    pointers = [w.data_ptr() for w in weight]
    monkeypatch.setattr(functional, "linear", watching)
    for arguments in batches:
        loss = model(**arguments).loss
        (loss * (arguments["labels"] != -100).sum()).backward()
    monkeypatch.undo()
    for products in seen.values():
        x, y = zip(*products, strict=True)
        yield torch.cat(x), torch.cat([each.grad for each in y])


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_experts_have_scales_of_their_own_and_one_strength(way, monkeypatch):
    """Their costs are means over the tokens of all experts."""
    base = make("Mixtral")
    base.set_experts_implementation("eager")
    names = [f"model.layers.{i}.mlp.experts.{p}_proj" for i in (0, 1) for p in ("gate_up", "down")]
    model = randomize(moe("Mixtral"), size=0)
    model.set_experts_implementation(way)
    batches = [{name: t.repeat(8, 1) for name, t in batch().items()}]
    strengths = calibrate(model, batches)
    texts, base, costs = own_text(base), base.double(), {}
    for name in names:
        in_batches = [x for x, _ in products_of(base, name, batches, monkeypatch)]
        in_own_text = [*products_of(base, name, texts, monkeypatch)]
        module, _, parameter = f"base_model.model.{name}".rpartition(".")
        layer = model.get_submodule(module).adapters[parameter]
        scales = layer.randlora_input_scale["default"]
        cost = total = 0.0
        for expert, (x, gradients) in enumerate(in_own_text):
            seen = enough(in_batches[expert], in_batches)
            scale = input_scale_of(seen, own_text=enough(x, [each for each, _ in in_own_text]))
            assert relative(normalized(scales[expert]), scale) < 1e-3
            energy = (x * scale.double()).square().mean(0).sum()
            cost += len(x) * gradients.square().mean(0).sum() * energy
            total += len(x)
        costs[f"base_model.model.{name}"] = float(cost / total)
    assert strengths == pytest.approx(strengths_of(costs), rel=1e-3)


def enough(x, of_all):
    """What an expert saw; what all have seen if these are fewer than 32 tokens."""
    return x if len(x) >= 32 else torch.cat(of_all)
