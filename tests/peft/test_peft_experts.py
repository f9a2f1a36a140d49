"""RandLoraConfig(target_parameters=...): full-rank adapters of fused experts, without files."""

import copy

import pytest
import torch
from compile_helpers import assert_steps_agree, graphs, needs_compiler
from compile_helpers import fresh_dynamo as fresh_dynamo
from expert_models import EXPERTS, FAMILIES, MODELS, batch, logits, make, train, with_scales
from peft_experts import Mixture, experts_of, moe, oracle, parameters_of
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
)
from torch import nn

from randlora_ext.nn.experts import AdaptedModule

pytestmark = pytest.mark.filterwarnings("ignore:.*(checkpointing|use_reentrant|randlora_alpha)")


# ---- one layer for each module -------------------------------------------------------------------

IN_EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)


@IN_EVERY_FAMILY
def test_the_parameters_of_a_module_are_one_layer(name):
    model = moe(name)
    around = experts_of(model)
    assert type(around) is AdaptedModule and not hasattr(around.base_layer, "base_layer")
    assert list(parameters_of(model)) == ["gate_up_proj", "down_proj"]
    assert not [m for m in around.base_layer.modules() if isinstance(m, AdaptedModule)]


@IN_EVERY_FAMILY
def test_names_do_not_depend_on_the_order_of_target_parameters(name):
    one, other = (moe(name, target_parameters=order) for order in (EXPERTS, EXPERTS[::-1]))
    assert list(one.state_dict()) == list(other.state_dict())
    assert torch.equal(logits(one), logits(other))


@IN_EVERY_FAMILY
def test_a_summary_names_the_parameter_and_counts_the_experts(name):
    summary = accelerated.kernel_summary(moe(name))
    assert "gate_up_proj of 4 experts" in summary and "plain" not in summary


@IN_EVERY_FAMILY
def test_gpt_oss_and_llama_4_store_their_experts_transposed(name):
    transposed = {layer.transposed for layer in parameters_of(moe(name)).values()}
    assert transposed == {name in ("GptOss", "Llama4")}


@IN_EVERY_FAMILY
def test_every_expert_has_diagonals_of_its_own(name):
    model = moe(name)
    diagonals = [p for p in model.parameters() if p.requires_grad]
    assert len(diagonals) == 2 * len(layers(model)) > 0
    assert {(p.dim(), len(p)) for p in diagonals} == {(3, 4)}


# As PEFT's LoRA: a model that PEFT does not know has experts alone, others the usual ones.
@pytest.mark.parametrize("name, count", [("Qwen3Moe", 4), ("Mixtral", 8)])
def test_without_target_modules(name, count):
    accelerated.enable()
    chosen = accelerated.RandLoraConfig(r=4, basis="hadamard", target_parameters=EXPERTS)
    assert len(layers(peft.get_peft_model(make(name), chosen))) == count


# ---- numbers -------------------------------------------------------------------------------------


@IN_EVERY_FAMILY
def test_a_new_adapter_changes_nothing_yet(name):
    assert torch.equal(logits(to_train(name)), logits(make(name)))


@IN_EVERY_FAMILY
def test_a_disabled_adapter_changes_nothing_and_an_enabled_one_does(name):
    model, plain = moe(name), logits(make(name))
    assert (logits(model) - plain).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@IN_EVERY_FAMILY
@torch.no_grad()
def test_the_weight_of_each_expert_is_the_sum_rounded_from_float64(name):
    """But for elements that lie near the middle between two numbers of the dtype."""
    model = with_scales(moe(name)).to(torch.bfloat16)
    for layer in parameters_of(model).values():
        wanted = (layer._base_weight().double() + oracle(layer)).bfloat16()
        equal = layer.adapted_weight() == wanted
        assert equal.float().mean() > 0.999
        torch.testing.assert_close(layer.adapted_weight(), wanted)  # the others are neighbours


@IN_EVERY_FAMILY
@torch.no_grad()
def test_merging_writes_what_forward_computes_with(name):
    model = moe(name)
    want = logits(model)
    wanted = [layer.adapted_weight() for layer in parameters_of(model).values()]
    model.merge_adapter(safe_merge=True)
    for layer, weight in zip(parameters_of(model).values(), wanted, strict=True):
        assert torch.equal(layer._base_weight(), weight)
    assert torch.equal(logits(model), want)


@IN_EVERY_FAMILY
def test_unmerging_restores_every_bit(name):
    model = moe(name)
    before = numbers(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_unchanged(model, before)


@IN_EVERY_FAMILY
def test_a_merged_and_unloaded_model_is_the_base_model_with_the_update(name):
    model = moe(name)
    want = logits(model)
    unloaded = model.merge_and_unload()
    assert unloaded.state_dict().keys() == make(name).state_dict().keys()
    assert torch.equal(logits(unloaded), want)


@IN_EVERY_FAMILY
def test_an_unloaded_model_is_the_base_model(name):
    unloaded = moe(name).unload()
    assert [type(m) for m in unloaded.modules()] == [type(m) for m in make(name).modules()]
    assert torch.equal(logits(unloaded), logits(make(name)))


# ---- training ------------------------------------------------------------------------------------


def to_train(name):
    accelerated.enable()
    options = {"basis": "hadamard", "target_parameters": EXPERTS, "randlora_alpha": 80}
    chosen = config(4, accelerated.RandLoraConfig, [], **options)
    return peft.get_peft_model(make(name), chosen)


@IN_EVERY_FAMILY
def test_training_lowers_the_loss(name):
    losses = train(to_train(name))
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_trains_alike(name):
    model, checkpointed = to_train(name), to_train(name)
    checkpointed.base_model.model.gradient_checkpointing_enable()
    checkpointed.enable_input_require_grads()
    assert train(checkpointed, 3) == pytest.approx(train(model, 3), rel=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_gradients(name, implementation):
    model = moe(name)
    model.base_model.model.config._experts_implementation = implementation
    merged, token = copy.deepcopy(model), torch.tensor([[3]])
    merged.merge_adapter()
    for one in (model, merged):
        for layer in parameters_of(merged).values():
            layer._base_weight().requires_grad_(True)
        one(input_ids=token).logits.square().sum().backward()
    each = parameters_of(model).values(), parameters_of(merged).values()
    for layer, of in zip(*each, strict=True):
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


# ---- input scales, of each expert or one for all -------------------------------------------------


@pytest.fixture(params=[True, False], ids=["of each", "one for all"])
def of_each(request):
    return request.param


@pytest.fixture(params=["Qwen3Moe", "GptOss"])
def scaled(request, of_each):
    return with_scales(moe(request.param), of_each)


def test_experts_have_input_scales(scaled, of_each):
    for layer in layers(scaled):
        scale = layer.randlora_input_scale["default"]
        assert scale.shape == (4, layer.in_features)
        assert of_each != torch.equal(scale[0], scale[1])


def test_the_input_scale_of_an_expert_scales_the_columns_of_its_update(scaled):
    for layer in layers(scaled):
        scale = layer.randlora_input_scale["default"].clone()
        delta = layer.get_delta_weight("default")
        layer.set_input_scale("default", torch.ones(layer.in_features))
        columns = scale[..., None] if layer.transposed else scale[..., None, :]
        torch.testing.assert_close(delta, layer.get_delta_weight("default") * columns)


def test_input_scales_of_too_few_experts_are_refused(scaled):
    for layer in layers(scaled):
        with pytest.raises(ValueError, match=r"must be \(experts, in_features\) = \(4, "):
            layer.set_input_scale("default", torch.ones(3, layer.in_features))


# ---- beside linear layers, and other parameters --------------------------------------------------


class Named(nn.Module):
    """Experts around a linear layer that is called like them, beside another one outside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(3, 24, 24))
        self.shared = nn.ModuleDict({"gate_up_proj": nn.Linear(24, 24)})

    def forward(self, x):
        return torch.einsum("ti,eoi->to", self.shared["gate_up_proj"](x), self.gate_up_proj)


def named():
    return nn.Sequential(Named(), nn.ModuleDict({"gate_up_proj": nn.Linear(24, 24)}))


NAMED = {"basis": "hadamard", "targets": ["gate_up_proj"], "target_parameters": ["0.gate_up_proj"]}
OF_NAMED = {
    "0.adapted_parameters.gate_up_proj",
    "0.base_layer.shared.gate_up_proj",
    "1.gate_up_proj",
}


@pytest.fixture
def both_called_alike():
    """A model of two adapters of linear layers and of experts of one name."""
    model = adapted(named(), r=4, **NAMED)
    return randomize(second_of_named(model))


def second_of_named(model):
    model.add_adapter("two", config(3, accelerated.RandLoraConfig, **NAMED))
    return model


def test_a_linear_layer_called_like_the_parameter(both_called_alike):
    for adapter in ("default", "two"):
        end = f".randlora_lambda.{adapter}"
        found = {name for name, _ in both_called_alike.named_parameters() if name.endswith(end)}
        assert found == {f"base_model.model.{name}{end}" for name in OF_NAMED}


def test_a_linear_layer_inside_the_module_is_merged_and_unloaded_with_it(both_called_alike):
    model, x = both_called_alike.base_model.model, torch.randn(5, 24)
    want = model[0](x)
    unloaded = both_called_alike.merge_and_unload()
    assert unloaded.state_dict().keys() == named().state_dict().keys()
    assert relative(unloaded[0](x), want) < 1e-5


def test_a_matrix_beside_stacked_experts():
    """(out, in) is one expert; a module that says nothing stores (experts, out, in)."""
    torch.manual_seed(0)
    own = Mixture(lambda h, up: torch.einsum("ti,eoi->to", h, up) @ own.matrix.T)
    own.matrix = nn.Parameter(torch.randn(8, 24))
    net = nn.Sequential(own.bfloat16())
    chosen = {"basis": "hadamard", "target_parameters": ["0.matrix", "0.up"]}
    model, x = adapted(net, [], 4, **chosen), torch.randn(5, 24, dtype=torch.bfloat16)
    y, of = model(x), dict(net[0].adapted_parameters.named_children())
    assert {name: layer.experts for name, layer in of.items()} == {"up": (3,), "matrix": (1,)}
    with torch.no_grad():
        for layer in of.values():
            weight = layer._base_weight()
            assert layer.randlora_lambda["default"].dtype == torch.float32
            weight.copy_(weight.double() + oracle(layer).view(weight.shape))
    assert relative(y, own(x)) < 1e-2


class Memory(nn.Module):
    """Its parameters are called like methods of a dictionary."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.keys, self.values = (nn.Parameter(torch.randn(5, 24, 24)) for _ in range(2))

    def forward(self, x):
        return torch.einsum("ti,eoi->to", x @ self.keys[0], self.values)


def test_parameters_that_are_called_keys_and_values():
    chosen = {"basis": "hadamard", "target_parameters": ["0.keys", "0.values"]}
    model, x = adapted(nn.Sequential(Memory()), [], 4, **chosen), torch.randn(5, 24)
    want = model(x)
    assert relative(want, Memory()(x)) > 0.1
    assert torch.equal(model.merge_and_unload()(x), want)
