"""RandLoraConfig(target_parameters=...): full-rank adapters of fused experts."""

import copy

import pytest
import torch
from compile_helpers import assert_steps_agree, graphs, needs_compiler
from compile_helpers import fresh_dynamo as fresh_dynamo
from expert_models import EXPERTS, MODELS, batch, logits, make, train
from peft_experts import Mixture, moe, oracle, wrappers
from peft_helpers import (
    accelerated,
    adapted,
    assert_unchanged,
    config,
    layers,
    numbers,
    opened,
    peft,
    randomize,
    relative,
)
from safetensors.torch import load_file

from randlora_ext.nn.adapter_record import RECORD_KEY

pytestmark = pytest.mark.filterwarnings("ignore:.*(checkpointing|use_reentrant)")


def assert_equal_but_for_rounding(one, other):
    assert (one - other).abs().max() < 1e-5 * other.abs().max()


# ---- numbers -------------------------------------------------------------------------------------

ON_EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


@ON_EVERY_MODEL
def test_a_summary_names_the_parameter_and_counts_the_experts(name):
    summary = accelerated.kernel_summary(moe(name))
    assert "gate_up_proj of 4 experts" in summary and "plain" not in summary


@ON_EVERY_MODEL
def test_a_disabled_adapter_changes_nothing_and_an_enabled_one_does(name):
    model, plain = moe(name), logits(make(name))
    assert (logits(model) - plain).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@ON_EVERY_MODEL
@torch.no_grad()
def test_merging_adds_to_each_expert_the_update_of_the_reference(name):
    model = moe(name)
    wanted = [layer._base_weight() + oracle(layer).float() for layer in wrappers(model)]
    model.merge_adapter(safe_merge=True)
    for layer, weight in zip(wrappers(model), wanted, strict=True):
        assert torch.allclose(layer._base_weight(), weight, atol=1e-5)


@ON_EVERY_MODEL
def test_only_gpt_oss_stores_its_experts_transposed(name):
    for layer in wrappers(moe(name)):
        assert layer.get_base_layer().is_transposed == (name == "GptOss")


@ON_EVERY_MODEL
def test_a_merged_model_computes_what_the_adapter_did(name):
    model = moe(name)
    want = logits(model)
    model.merge_adapter()
    assert_equal_but_for_rounding(logits(model), want)


@ON_EVERY_MODEL
def test_unmerging_restores_every_bit(name):
    model = moe(name)
    before = numbers(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_unchanged(model, before)


@ON_EVERY_MODEL
def test_an_unloaded_model_is_the_base_model_with_the_update(name):
    model = moe(name)
    want = logits(model)
    unloaded = model.merge_and_unload()
    assert unloaded.state_dict().keys() == make(name).state_dict().keys()
    assert_equal_but_for_rounding(logits(unloaded), want)


@ON_EVERY_MODEL
def test_a_saved_adapter_comes_back_bit_for_bit(name, tmp_path):
    model = moe(name)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(opened(tmp_path, lambda: make(name))), logits(model))


# ---- training ------------------------------------------------------------------------------------


def to_train(name):
    accelerated.enable()
    options = {"basis": "hadamard", "target_parameters": EXPERTS, "randlora_alpha": 80}
    chosen = config(4, accelerated.RandLoraConfig, [], **options)
    return peft.get_peft_model(make(name), chosen)


@ON_EVERY_MODEL
def test_training_lowers_the_loss(name):
    losses = train(to_train(name))
    assert losses[-1] < losses[0] / 3


@ON_EVERY_MODEL
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


# ---- several adapters ----------------------------------------------------------------------------


@pytest.fixture
def two():
    """With the adapters "default", which is active, and "two", of other numbers and options."""
    model = moe(seed=1)
    bases = dict(basis="hadamard", projection_prng_key=7, target_parameters=EXPERTS[::-1])
    model.add_adapter("two", config(8, accelerated.RandLoraConfig, [], **bases))
    return model


def randomized(model):
    """Random numbers in the active adapter, too."""
    model.set_adapter("two")
    return randomize(model, 2)


def test_a_second_adapter_is_not_active(two):
    assert torch.equal(logits(two), logits(moe(seed=1)))


def test_a_new_adapter_changes_nothing_yet(two):
    two.set_adapter("two")
    assert torch.equal(logits(two), logits(make("Mixtral")))


def test_switching_back_and_forth(two):
    one = logits(two)
    second = logits(randomized(two))
    assert not torch.equal(second, one)
    two.set_adapter("default")
    first = logits(two)
    two.set_adapter("two")
    assert torch.equal(logits(two), second) and not torch.equal(first, second)


def test_two_active_adapters_are_merged_together(two):
    randomized(two).base_model.set_adapter(["default", "two"])
    both = logits(two)
    two.merge_adapter()
    assert_equal_but_for_rounding(logits(two), both)


def test_deleting_the_one_leaves_the_other(two):
    second = logits(randomized(two))
    two.delete_adapter("default")
    two.set_adapter("two")
    assert torch.equal(logits(two), second)


def load_over(model, folder):
    model.load_adapter(folder, "default")
    model.set_adapter("default")


def load_anew(model, folder):
    model.load_adapter(folder, "three")
    model.set_adapter("three")


def swap_in(model, folder):
    model.set_adapter("default")
    accelerated.hotswap_adapter(model, folder, "default")


@pytest.mark.parametrize("load", [load_over, load_anew, swap_in])
def test_loading_beside_another_adapter(two, tmp_path, load):
    saved = moe(seed=3)
    saved.save_pretrained(tmp_path)
    load(randomized(two), tmp_path)
    assert torch.equal(logits(two), logits(saved))


# ---- beside linear layers ------------------------------------------------------------------------


@pytest.fixture
def beside_linear(tmp_path):
    """An adapter of experts and linear layers, saved beside its base model."""
    model = moe("Qwen3Moe", targets=["q_proj"], task_type="CAUSAL_LM")
    make("Qwen3Moe").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return model


@pytest.mark.parametrize("low", [False, True])
def test_beside_linear_layers_and_opened_by_peft_s_auto_class(tmp_path, beside_linear, low):
    by_class = peft.AutoPeftModelForCausalLM.from_pretrained
    opened = by_class(tmp_path / "adapter", low_cpu_mem_usage=low)
    assert torch.equal(logits(opened), logits(beside_linear))


def test_names_and_shapes_in_a_file(tmp_path, beside_linear):
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


# As PEFT's LoRA: a model that PEFT does not know has experts alone, others the usual ones.
@pytest.mark.parametrize("name, count", [("Qwen3Moe", 4), ("Mixtral", 8)])
def test_without_target_modules(name, count):
    accelerated.enable()
    chosen = accelerated.RandLoraConfig(r=4, basis="hadamard", target_parameters=EXPERTS)
    assert len(layers(peft.get_peft_model(make(name), chosen))) == count


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
