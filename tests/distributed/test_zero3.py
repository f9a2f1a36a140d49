"""Weights that lie elsewhere, as DeepSpeed's ZeRO-3 leaves them, imitated in one process.

DeepSpeed itself: distributed_deepspeed.py.
"""

import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from layer_helpers import make_base
from torch import nn

from randlora_ext import RandLoraLinear, calibrate, set_dial

SIZES = 24, 40


def partition(parameter: nn.Parameter) -> torch.Tensor:
    """Empties a parameter as ZeRO-3 does; returns its values."""
    values = parameter.data
    parameter.ds_shape, parameter.ds_id = values.shape, id(parameter)
    parameter.data = values.new_empty(0)
    return values


def gather(held: dict[nn.Parameter, torch.Tensor]):
    for parameter, values in held.items():
        parameter.data = values.clone()


@pytest.mark.parametrize("layer_type", ["linear", "conv1d"])
def test_adapters_are_added_without_the_weight(layer_type):
    base = make_base(*SIZES, layer_type)
    partition(base.weight)
    made = RandLoraLinear(base, r=5)
    assert (made.in_features, made.out_features) == SIZES
    assert made.randlora_gamma["default"].shape == (5, 24)


def test_merging_wants_the_weight():
    made, x = RandLoraLinear(make_base(*SIZES), r=5), torch.randn(3, SIZES[0])
    nn.init.normal_(made.randlora_lambda["default"])
    want = made(x)
    held = {p: partition(p) for p in made.parameters()}
    before = [values.clone() for values in held.values()]
    with pytest.raises(ValueError, match=r"lam must be \(r, n\) = \(5, 5\) .*, got \(0,\)"):
        made.get_delta_weight("default")
    with pytest.raises(RuntimeError, match=r"base_layer.weight is \(0,\) here .*GatheredParam"):
        made.merge()
    assert not made.merged and all(map(torch.equal, before, held.values()))
    gather(held)
    made.merge()
    held = {p: partition(p) for p in made.parameters()}
    with pytest.raises(RuntimeError, match="GatheredParameters"):
        made.unmerge()
    assert made.merged
    gather(held)
    torch.testing.assert_close(made(x), want)
    made.unmerge()
    torch.testing.assert_close(made(x), want)


@pytest.mark.usefixtures("stock_peft")
def test_experts_wait_for_their_weight():
    """Bilinear's is (3, 16, 24), like that of three experts."""
    peft_helpers = pytest.importorskip("peft_helpers")
    model, x = nn.ModuleList([nn.Bilinear(16, 24, 3)]), (torch.randn(2, 16), torch.randn(2, 24))
    want = model[0](*x)
    held = {model[0].weight: partition(model[0].weight)}
    chosen = {"basis": "hadamard", "target_parameters": ["0.weight"]}
    peft_helpers.adapted(model, [], r=5, **chosen)
    (layer,) = model[0].adapters.values()
    assert layer.randlora_lambda["default"].shape == (3, 5, 4)
    nn.init.zeros_(layer.randlora_lambda["default"])
    with pytest.raises(RuntimeError, match="weight is not whole here .* DeepSpeed ZeRO-3"):
        model[0](*x)
    gather(held)
    torch.testing.assert_close(model[0](*x), want)


@contextmanager
def gathered_parameters(held, parameters, modifier_rank=None):
    """What is written inside is kept if a rank is said to write."""
    assert list(parameters) == list(held)
    gather(held)
    try:
        yield
    finally:
        for parameter in held:
            written = partition(parameter)
            if modifier_rank is not None:
                held[parameter] = written


@pytest.fixture
def in_parts(monkeypatch):
    """A model whose lambda is elsewhere, and what deepspeed holds of it."""
    model = nn.Sequential(RandLoraLinear(nn.Linear(*SIZES), r=5))
    lam = model[0].randlora_lambda["default"]
    nn.init.normal_(lam)
    held = {lam: partition(lam)}
    zero = SimpleNamespace(GatheredParameters=partial(gathered_parameters, held))
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    return model, held


def test_calibrate_looks_at_whole_lambdas(in_parts):
    """A part of lambda, or nothing of it, does not say whether the adapter has trained."""
    model, _ = in_parts
    with pytest.raises(ValueError, match="has trained"):
        calibrate(model, [torch.randn(3, SIZES[0])])
    assert not model[0].is_calibrated("default")


def test_set_dial_turns_whole_lambdas(in_parts):
    model, held = in_parts
    ((lam, before),) = held.items()
    set_dial(model, 0.5)
    assert torch.equal(held[lam], 0.5 * before) and not lam.numel()
    with pytest.raises(ValueError, match="infinite or zero"):
        set_dial(model, 1e300)
    assert torch.equal(held[lam], 0.5 * before)
