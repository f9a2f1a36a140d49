"""RandLoraConfig(target_parameters=...): full-rank adapters of fused experts."""

import copy

import pytest
import torch
from expert_models import EXPERTS, MODELS, batch, logits, make, train
from peft_helpers import accelerated, adapted, assert_unchanged, config, numbers, peft, randomize
from safetensors.torch import load_file

from randlora_ext.reference import delta_weight_reference

pytestmark = pytest.mark.filterwarnings("ignore:.*(checkpointing|use_reentrant)")


def moe(name="Mixtral", seed=0, **options):
    options = {"basis": "hadamard", "target_parameters": EXPERTS, "targets": []} | options
    return adapted(make(name), r=4, seed=seed, **options)


def wrappers(model):
    """Outer and inner layers, of down_proj and gate_up_proj, of the last block."""
    outer = model.base_model.model.model.layers[-1].mlp.experts
    return outer, outer.base_layer


def oracle(layer):
    """dW of each expert by the reference, as the parameter is stored."""
    A, B = layer.basis_of("default", torch.device("cpu")).dense(dtype=torch.float64)
    each = zip(layer.randlora_lambda["default"], layer.randlora_gamma["default"], strict=True)
    sizes = layer.scaling["default"], layer.out_features, layer.in_features
    dW = [delta_weight_reference(A, B, *(t.double() for t in e), *sizes) for e in each]
    return torch.stack([d.T if layer.transposed else d for d in dW])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_numbers(name, tmp_path):
    base = make(name)
    plain, model = logits(base), moe(name)
    told = accelerated.kernel_summary(model)
    assert "gate_up_proj of 4 experts" in told and "plain" not in told
    y, by_hand = logits(model), copy.deepcopy(model)
    assert (y - plain).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    before = numbers(model)
    model.merge_adapter(safe_merge=True)
    assert (logits(model) - y).abs().max() < 1e-5 * y.abs().max()
    for layer in wrappers(by_hand):
        assert layer.get_base_layer().is_transposed == (name == "GptOss")
        layer._base_weight().add_(oracle(layer).float())
        merged = dict(model.named_modules())[layer_path(by_hand, layer)]._base_weight()
        assert torch.allclose(layer._base_weight(), merged, atol=1e-5)
    model.unmerge_adapter()
    assert_unchanged(model, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path)), y)
    unloaded = model.merge_and_unload()
    assert type(unloaded.model.layers[-1].mlp.experts) is type(make(name).model.layers[-1].mlp.experts)
    assert (logits(unloaded) - y).abs().max() < 1e-5 * y.abs().max()


def layer_path(model, layer):
    return next(path for path, module in model.named_modules() if module is layer)


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
