"""Where a factor that `set_dial` gave goes under PEFT: through every door that an adapter has."""

import copy

import expert_models
import pytest
import torch
from cli_helpers import llama, run
from layer_helpers import uneven
from peft_helpers import (
    accelerated,
    adapted,
    layers,
    made,
    opened,
    peft,
    randomize,
    relative,
    stock_made,
)
from transformers import AutoModelForCausalLM

import randlora_ext
from randlora_ext import set_dial

FACTOR = 0.7
KINDS = [{"basis": "hadamard"}, {"density": 0.3}, {"sparse": True}, {}]


def turned(**options):
    """A model whose adapter is turned down, and its dW before."""
    model = made(**options)
    if options.get("basis") == "hadamard":
        randomize(model, size=0)
        randlora_ext.calibrate(model, [uneven(2, 9)])
        randomize(model, size=0.1)
    before = deltas(model)
    set_dial(model, FACTOR)
    return model.eval(), before


def deltas(model, adapter="default"):
    return [layer.get_delta_weight(adapter).detach() for layer in layers(model)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_every_door(kind, tmp_path):
    model, before = turned(**kind)
    for now, was in zip(deltas(model), before, strict=True):
        assert relative(now, was.double() * FACTOR) < 1e-6
    x = uneven(2, 9, seed=1)
    want = model(x)
    model.save_pretrained(tmp_path)
    bare = [made(seed=4, **kind).eval() for _ in range(5)]
    bare[0].load_adapter(tmp_path, "default")
    accelerated.hotswap_adapter(bare[1], tmp_path)
    bare[2].load_adapter(tmp_path, "two")
    bare[2].set_adapter("two")
    bare[3].load_state_dict(copy.deepcopy(model.state_dict()))
    peft.set_peft_model_state_dict(bare[4], peft.get_peft_model_state_dict(model))
    for door in (opened(tmp_path).eval(), *bare, copy.deepcopy(model)):
        assert torch.equal(door(x), want)
    merged = copy.deepcopy(model).merge_and_unload()
    assert relative(merged(x), want) < 1e-5
    kept = model.base_model.model.a.base_layer.weight.clone()
    model.merge_adapter()
    assert relative(model(x), want) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.a.base_layer.weight, kept)


@torch.no_grad()
def test_lora_and_stock_peft(tmp_path):
    model, _ = turned(basis="hadamard")
    x = uneven(2, 9, seed=1)
    want = model(x)
    peft.save_as_lora(tmp_path / "lora", model, rank=24)
    assert relative(opened(tmp_path / "lora").eval()(x), want) < 1e-5
    model, _ = turned(sparse=True)
    want = model(x)
    model.save_pretrained(tmp_path / "ours")
    accelerated.disable()
    assert relative(opened(tmp_path / "ours").eval()(x), want) < 1e-5


@torch.no_grad()
def test_merged_without_a_model(tmp_path):
    llama(initializer_range=0.3).save_pretrained(tmp_path / "base")
    model = adapted(llama(initializer_range=0.3), ["q_proj"], basis="hadamard").eval()
    set_dial(model, FACTOR)
    model.save_pretrained(tmp_path / "adapter")
    code, _, error = run("merge", *(tmp_path / name for name in ("base", "adapter", "out")))
    assert code == 0, error
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(9)[None]
    assert relative(merged(tokens).logits, model(tokens).logits) < 1e-5


def test_experts_and_adapters_of_stock_peft():
    chosen = {"basis": "hadamard", "targets": [], "target_parameters": expert_models.EXPERTS}
    model = adapted(expert_models.make("Mixtral"), r=4, **chosen)
    before = deltas(model)
    set_dial(model, FACTOR)
    for now, was in zip(deltas(model), before, strict=True):
        assert relative(now, was.double() * FACTOR) < 1e-6
    with pytest.raises(ValueError, match="adapter_name must be one of"):
        set_dial(stock_made(), FACTOR)


@torch.no_grad()
def test_the_curve_under_peft():
    model, _ = turned(basis="hadamard")
    x = uneven(2, 9, seed=1)

    def size(model):
        return model(x).norm()

    whole, none = randlora_ext.dial_curve(model, size, size, (1.0, 0.0))
    assert whole.task == pytest.approx(float(size(model)), rel=1e-6)
    with model.disable_adapter():
        assert none.text == pytest.approx(float(size(model)), rel=1e-5)
    assert none.text != pytest.approx(whole.text, rel=1e-3)
