"""Merging into the base weight: what is written, and what is refused.

test_unmerge.py has the way back, test_merge_refuses.py weights that cannot be merged into.
"""

import copy

import pytest
import torch
from layer_helpers import inputs, make_base, oracle, randomize, relative, two_adapters
from torch import nn

from randlora_ext import RandLoraLinear


class Merged:
    """A layer with two merged adapters and no kept weight, and what it was before."""

    def __init__(self, layer_type, dtype):
        self.base, self.dtype = make_base(24, 40, layer_type, dtype=dtype), dtype
        self.layer = RandLoraLinear(self.base, r=5, basis="independent")
        self.layer.update_layer("two", r=8)
        randomize(self.layer).set_adapter(["default", "two"])
        self.x, _ = inputs(self.layer, 9, dtype=dtype)
        self.before = self.base.weight.detach().clone()
        self.adapted = oracle(self.layer, self.x)[0]
        wide = torch.float32 if dtype.itemsize == 2 else torch.float64
        deltas = [self.layer.get_delta_weight(name).detach() for name in ("default", "two")]
        self.total = self.before.to(wide) + deltas[0] + deltas[1]
        self.layer.merge(safe_merge=True, keep_weight="nothing")

    def assert_computes_what_the_adapters_did(self):
        assert relative(self.layer(self.x), self.adapted) < 4 * torch.finfo(self.dtype).eps


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=["linear", "conv1d"])
def merged(request, dtype):
    return Merged(request.param, dtype)


def test_a_merged_layer_names_its_adapters_and_keeps_nothing(merged):
    assert merged.layer.merged_adapters == ["default", "two"] and merged.layer._kept.weight is None


def test_merging_rounds_the_sum_once(merged):
    assert torch.equal(merged.base.weight, merged.total.to(merged.dtype))


def test_a_merged_layer_is_its_base_layer(merged):
    assert torch.equal(merged.layer(merged.x), merged.base(merged.x))


def test_a_merged_layer_computes_what_the_adapters_did(merged):
    merged.assert_computes_what_the_adapters_did()


def test_unmerging_without_a_kept_weight_nearly_restores_it(merged):
    merged.layer.unmerge()
    assert not merged.layer.merged
    largest = torch.maximum(merged.before.abs(), merged.total.abs().to(merged.dtype))
    if merged.dtype == torch.float64:  # no wider dtype to add two adapters in
        largest = largest.max()
    error = (merged.base.weight - merged.before).abs()
    assert bool((error <= torch.finfo(merged.dtype).eps * largest).all())


def test_an_unmerged_layer_computes_what_the_adapters_did(merged):
    merged.layer.unmerge()
    merged.assert_computes_what_the_adapters_did()


def test_diagonals_are_in_float32_or_wider(dtype):
    layer = RandLoraLinear(make_base(24, 40, dtype=dtype), r=5)
    assert layer.randlora_lambda["default"].dtype == torch.promote_types(dtype, torch.float32)


@pytest.fixture
def half_merged():
    """The first of two adapters is merged, and the second has a NaN."""
    layer = two_adapters(torch.float32)
    layer.merge(adapter_names=["default"])
    layer.randlora_lambda["two"].data[0, 0] = torch.nan
    return layer


UNMERGEABLE = [
    (None, "host", "'default' is merged already"),
    (["two", "default"], "host", "'default' is merged already"),
    (["two", "x"], "host", r"adapter_names must be one of .*default.*two.*got 'x'"),
    (["two", "two"], "host", "must not repeat"),
    (["two"], "disk", "keep_weight must be one of .*'host'.*got 'disk'"),
    (["two"], "host", r"NaNs detected.* two seems"),
]


@pytest.mark.parametrize("names, keep_weight, message", UNMERGEABLE, ids=str)
def test_a_merge_that_is_refused_changes_nothing(half_merged, names, keep_weight, message):
    before = copy.deepcopy(half_merged.state_dict())
    with pytest.raises(ValueError, match=message):
        half_merged.merge(True, names, keep_weight)
    assert half_merged.merged_adapters == ["default"]
    for key, value in half_merged.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_a_merged_adapter_is_not_replaced(half_merged):
    with pytest.raises(ValueError, match="'default' is merged"):
        half_merged.update_layer("default")


@pytest.fixture
def layer():
    return RandLoraLinear(nn.Linear(24, 40), r=5)


def test_unmerging_what_is_not_merged_warns(layer):
    with pytest.warns(UserWarning, match="Nothing to do"):
        layer.unmerge()


def test_a_disabled_layer_is_not_merged(layer):
    layer.disable()
    with pytest.raises(RuntimeError, match="disabled"):
        layer.merge()
