"""RandLoraLinear: merging into the base weight, and out of it again."""

import copy

import pytest
import torch
from layer_helpers import inputs, make_base, oracle, randomize, relative, two_adapters
from torch import nn

from randlora_ext import RandLoraLinear
from randlora_ext.nn.merging import KEEP_WEIGHT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merge_rounds_once_and_without_a_kept_weight_unmerge_nearly_restores(kind, dtype):
    base = make_base(24, 40, kind, dtype=dtype)
    layer = randomize(RandLoraLinear(base, r=5))
    layer.update_layer("two", r=8, basis="hadamard")
    randomize(layer)
    layer.set_adapter(["default", "two"])
    x, _ = inputs(layer, 9, dtype=dtype)
    before, adapted = base.weight.detach().clone(), oracle(layer, x)[0]
    total = before.to(torch.float32 if dtype.itemsize == 2 else torch.float64)
    for name in ("default", "two"):
        total = total + layer.get_delta_weight(name).detach()
    layer.merge(safe_merge=True, keep_weight="nothing")
    assert layer.merged and layer.merged_adapters == ["default", "two"] and layer._kept is None
    assert torch.equal(base.weight, total.to(dtype))
    assert torch.equal(layer(x), base(x))
    assert relative(layer(x), adapted) < 4 * torch.finfo(dtype).eps
    layer.unmerge()
    assert not layer.merged
    largest = torch.maximum(before.abs(), total.abs().to(dtype))
    if dtype == torch.float64:  # no wider dtype to add two adapters in
        largest = largest.max()
    assert bool(((base.weight - before).abs() <= torch.finfo(dtype).eps * largest).all())
    assert relative(layer(x), adapted) < 4 * torch.finfo(dtype).eps


def test_merging_errors_change_nothing():
    layer = two_adapters(torch.float32)
    layer.merge(adapter_names=["default"])
    before = copy.deepcopy(layer.state_dict())

    def unchanged():
        assert layer.merged_adapters == ["default"]
        for key, value in layer.state_dict().items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)

    for names, keep_weight, message in (
        (None, "host", r"'default' is merged already.*'two'"),
        (["default"], "host", r"'default' is merged already.*'two'"),
        (["two", "default"], "host", r"'default' is merged already.*'two'"),
        (["two", "x"], "host", r"adapter_names: unknown adapter 'x'.*default.*two"),
        (["two", "two"], "host", "must not repeat"),
        (["two"], "disk", "keep_weight must be one of .*'host'.*got 'disk'"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.merge(adapter_names=names, keep_weight=keep_weight)
        unchanged()
    with pytest.raises(ValueError, match="'default' is merged"):
        layer.update_layer("default")
    with torch.no_grad():
        layer.randlora_lambda["two"][0, 0] = float("nan")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"NaNs detected.* two seems"):
        layer.merge(safe_merge=True, adapter_names=["two"])
    unchanged()
    layer.unmerge()
    with pytest.warns(UserWarning, match="Nothing to do"):
        layer.unmerge()
    layer.disable()
    with pytest.raises(RuntimeError, match="disabled"):
        layer.merge()


@pytest.mark.parametrize("keep_weight", KEEP_WEIGHT)
def test_a_merged_layer_refuses_to_load_before_anything_is_taken(keep_weight):
    layer = randomize(RandLoraLinear(make_base(24, 40), r=5))
    state = {k: v.clone() for k, v in randomize(copy.deepcopy(layer)).state_dict().items()}
    W, lam = layer.weight.clone(), layer.randlora_lambda["default"].detach().clone()
    model = nn.Sequential(layer)
    layer.merge(keep_weight=keep_weight)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"has merged \['default'\].*call unmerge\(\) first"):
            layer.load_state_dict(state, strict=strict)
        with pytest.raises(RuntimeError, match=r"0 has merged"):
            model.load_state_dict({f"0.{k}": v for k, v in state.items()}, strict=strict)
    assert torch.equal(layer.randlora_lambda["default"], lam)
    layer.unmerge()
    torch.testing.assert_close(layer.weight, W)
    layer.load_state_dict(state)
    assert torch.equal(layer.weight, state["base_layer.weight"])
