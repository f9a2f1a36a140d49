"""Merging into the base weight: what is written, and what is refused.

test_unmerge.py has the way back, test_merge_refuses.py weights that cannot be merged into.
"""

import copy

import pytest
import torch
from layer_helpers import inputs, make_base, oracle, randomize, relative
from mergeable import OfExperts, OfPeft, bits_of

from randlora_ext import RandLoraLinear


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=["linear", "conv1d"])
def layer(request, dtype):
    base = make_base(24, 40, request.param, dtype=dtype)
    return randomize(RandLoraLinear(base, r=5, basis="hadamard"))


@pytest.fixture
def x(layer, dtype):
    return inputs(layer, 9, dtype=dtype)[0]


@torch.no_grad()
def sum_in_float32_or_wider(weight, *deltas):
    wide = torch.float64 if weight.dtype == torch.float64 or len(deltas) > 1 else torch.float32
    return (weight.to(wide) + sum(delta.to(wide) for delta in deltas)).to(weight.dtype)


def test_merging_rounds_the_sum_once(layer):
    total = sum_in_float32_or_wider(layer.weight, layer.get_delta_weight("default"))
    layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, total)


def test_merging_writes_into_the_weight_itself(layer):
    """An optimizer, a tied module or a state dict that holds it sees the sum."""
    weight, memory = layer.weight, layer.weight.data_ptr()
    layer.merge()
    assert layer.weight is weight and weight.data_ptr() == memory


def test_a_merged_layer_is_its_base_layer(layer, x):
    layer.merge()
    assert torch.equal(layer(x), layer.base_layer(x))
    assert "default: r=5 hadamard" in repr(layer) and ", merged" in repr(layer)


def test_a_merged_layer_computes_what_the_adapter_did(layer, x, dtype):
    want = oracle(layer, x)[0]
    layer.merge()
    assert relative(layer(x), want) < 4 * torch.finfo(dtype).eps


def test_an_unmerged_layer_computes_the_same_bits_again(layer, x):
    y = layer(x)
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer(x), y)


@pytest.mark.filterwarnings("ignore")
def test_two_adapters_of_peft_are_added_before_the_sum_is_rounded(dtype):
    made = OfPeft(dtype)
    deltas = [made.layer.get_delta_weight(name) for name in ("default", "two")]
    exact = made.weight.detach().double() + deltas[0].double() + deltas[1].double()
    made.merge()
    digits = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    allowed = torch.finfo(dtype).eps / 2 + 2 * digits
    assert bool(((made.weight - exact).abs() <= allowed * exact.abs().clamp_min(1e-2)).all())


@pytest.mark.filterwarnings("ignore")
def test_experts_are_merged_as_one_stack(dtype):
    made = OfExperts(dtype)
    total = sum_in_float32_or_wider(made.weight, made.layer.get_delta_weight("default"))
    made.merge()
    assert torch.equal(bits_of(made.weight), bits_of(total))


# ---- what is refused -----------------------------------------------------------------------------


def assert_refused(layer, error, message, **options):
    before, merged = copy.deepcopy(layer.base_layer.state_dict()), layer.merged
    with pytest.raises(error, match=message):
        layer.merge(**options)
    after = layer.base_layer.state_dict()
    assert layer.merged == merged
    assert all(torch.equal(bits_of(after[key]), bits_of(before[key])) for key in before)


def test_a_layer_is_not_merged_twice(layer):
    layer.merge()
    assert_refused(layer, ValueError, r"merged already; call unmerge\(\) first")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_safe_merge_refuses_what_is_not_finite(layer, bad):
    layer.randlora_lambda["default"].data[0, 0] = bad
    told = "NaNs detected in the merged weights. The adapter default seems to be broken; safe_merge"
    assert_refused(layer, ValueError, told, safe_merge=True)


def test_a_safe_merge_looks_at_the_sum_in_the_dtype_of_the_weight():
    """What is finite in float32 may be too large for float16."""
    layer = randomize(RandLoraLinear(make_base(24, 40, dtype=torch.float16), r=5))
    with torch.no_grad():
        layer.randlora_lambda["default"].mul_(1e6)
    assert bool(layer.get_delta_weight("default").isfinite().all())
    assert_refused(layer, ValueError, "NaNs detected", safe_merge=True)


def test_another_merge_writes_what_is_not_finite(layer):
    W = bits_of(layer.weight)
    layer.randlora_lambda["default"].data[0, 0] = torch.nan
    layer.merge()
    assert not bool(layer.weight.isfinite().all())
    layer.unmerge()
    assert torch.equal(bits_of(layer.weight), W)
