"""Where a factor that `set_dial` gave goes under PEFT: through every door that an adapter has."""

import copy

import expert_models
import pytest
import torch
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


X = uneven(2, 9, seed=1)


@pytest.fixture(params=KINDS, ids=str)
def options(request):
    return request.param


@pytest.fixture
def model(options):
    return turned(**options)[0]


def test_the_factor_multiplies_dw(options):
    model, before = turned(**options)
    for now, was in zip(deltas(model), before, strict=True):
        assert relative(now, was.double() * FACTOR) < 1e-6


def by_from_pretrained(model, bare, folder):
    return opened(folder).eval()


def by_load_adapter_over_another(model, bare, folder):
    bare.load_adapter(folder, "default")
    return bare


def by_load_adapter_beside_another(model, bare, folder):
    bare.load_adapter(folder, "two")
    bare.set_adapter("two")
    return bare


def by_load_state_dict(model, bare, folder):
    bare.load_state_dict(copy.deepcopy(model.state_dict()))
    return bare


def by_set_peft_model_state_dict(model, bare, folder):
    peft.set_peft_model_state_dict(bare, peft.get_peft_model_state_dict(model))
    return bare


def by_deepcopy(model, bare, folder):
    return copy.deepcopy(model)


DOORS = [
    by_from_pretrained,
    by_load_adapter_over_another,
    by_load_adapter_beside_another,
    by_load_state_dict,
    by_set_peft_model_state_dict,
    by_deepcopy,
]


@pytest.mark.parametrize("door", DOORS)
@torch.no_grad()
def test_the_factor_goes_through_every_door(options, model, door, tmp_path):
    model.save_pretrained(tmp_path)
    bare = made(seed=4, **options).eval()
    assert torch.equal(door(model, bare, tmp_path)(X), model(X))


@torch.no_grad()
def test_the_factor_is_merged_and_unloaded(model):
    want = model(X)
    assert relative(model.merge_and_unload()(X), want) < 1e-5


@torch.no_grad()
def test_the_factor_is_merged(model):
    want = model(X)
    model.merge_adapter()
    assert relative(model(X), want) < 1e-5


@torch.no_grad()
def test_unmerging_restores_every_bit(model):
    weight = model.base_model.model.a.base_layer.weight
    before = weight.clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(weight, before)


@torch.no_grad()
def test_the_factor_goes_into_lora(tmp_path):
    model, _ = turned(basis="hadamard")
    want = model(X)
    peft.save_as_lora(tmp_path, model, rank=24)
    assert relative(opened(tmp_path).eval()(X), want) < 1e-5


@torch.no_grad()
def test_the_factor_goes_to_stock_peft(tmp_path):
    model, _ = turned(sparse=True)
    want = model(X)
    model.save_pretrained(tmp_path)
    accelerated.disable()
    assert relative(opened(tmp_path).eval()(X), want) < 1e-5


def test_the_factor_multiplies_dw_of_experts():
    chosen = {"basis": "hadamard", "targets": [], "target_parameters": expert_models.EXPERTS}
    model = adapted(expert_models.make("Mixtral"), r=4, **chosen)
    before = deltas(model)
    set_dial(model, FACTOR)
    for now, was in zip(deltas(model), before, strict=True):
        assert relative(now, was.double() * FACTOR) < 1e-6


def test_layers_of_stock_peft_have_no_dial():
    with pytest.raises(ValueError, match="^model has no RandLoRA adapter on our layers"):
        set_dial(stock_made(), FACTOR)


def test_one_adapter_among_several():
    model, _ = turned(basis="hadamard")
    model.add_adapter("two", copy.deepcopy(model.peft_config["default"]))
    randomize(model, size=0.1)
    one, two = deltas(model), deltas(model, "two")
    set_dial(model, 0.5, "two")  # exact
    assert all(map(torch.equal, deltas(model), one))
    for now, was in zip(deltas(model, "two"), two, strict=True):
        assert torch.equal(now, was / 2)
