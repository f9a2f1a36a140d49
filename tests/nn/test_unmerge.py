"""Unmerging restores every bit of W, whatever happened since: our own layers and PEFT's.

test_interrupted_merges.py has Ctrl-C.
"""

import copy
import warnings
import weakref

import pytest
import torch
from layer_helpers import pickled
from mergeable import ALL, FLOATING, OfPeft, Plain, bits_of, learn
from torch import nn

# PEFT warns of second and of unmerged adapters.
pytestmark = pytest.mark.filterwarnings("ignore:.*merg")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EACH = pytest.mark.parametrize("make", FLOATING.values(), ids=FLOATING)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@EACH
@EVERY_DTYPE
def test_every_bit_comes_back_after_the_adapters_have_changed(make, dtype):
    made = make(dtype)
    with torch.no_grad():
        row = made.weight.view(-1, made.weight.shape[-1])[0]
        row[:4] = torch.tensor([-0.0, 0.0, 1e-7, -1e4])
    W = made.bits()
    for seed in range(2):
        made.merge()
        assert made.layer.merged and not torch.equal(made.bits(), W)
        learn(made.layer, seed)
        made.layer.unmerge()
        assert not made.layer.merged and torch.equal(made.bits(), W)


@pytest.mark.parametrize("names", [["default"], ["two"], ["two", "default"], None], ids=str)
@EVERY_DTYPE
def test_every_bit_comes_back_in_any_order_of_several_adapters(names, dtype):
    made = OfPeft(dtype)
    W = made.bits()
    for name in names or [None]:
        made.merge(name and [name])
        learn(made.layer, 0)
    made.layer.unmerge()
    assert torch.equal(made.bits(), W)


@pytest.mark.parametrize("bits", [8, 4])
def test_every_bit_of_a_quantized_layer_comes_back(bits):
    made = ALL[f"{bits} bits"]()
    W = made.bits()
    for seed in range(2):
        made.merge()
        assert not torch.equal(made.bits(), W)
        learn(made.layer, seed)
        made.layer.unmerge()
        assert torch.equal(made.bits(), W)


@EACH
def test_a_weight_of_nan_and_infinity_comes_back(make):
    made = make(torch.float32)
    with torch.no_grad():
        made.weight.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    W = made.bits()
    made.merge()
    made.layer.unmerge()
    assert torch.equal(made.bits(), W)


@EACH
@EVERY_DTYPE
def test_what_is_kept_is_no_part_of_the_module(make, dtype):
    made = make(dtype)
    made.merge()
    layer, (kept,) = made.layer, made.layer._kept
    assert (kept.dtype, kept.device.type) == (dtype, "cpu")
    assert not any("kept" in key for key in layer.state_dict())
    assert all(tensor is not kept for tensor in [*layer.parameters(), *layer.buffers()])


@EACH
def test_unmerging_frees_what_was_kept(make):
    made = make()
    made.merge()
    kept = weakref.ref(made.layer._kept[0])
    made.layer.unmerge()
    assert made.layer._kept == () and kept() is None


@EACH
def test_unmerging_what_is_not_merged_warns(make):
    made = make()
    W = made.bits()
    with pytest.warns(UserWarning, match="^Already unmerged. Nothing to do.") as caught:
        made.layer.unmerge()
    assert [w.filename for w in caught] == [__file__] and torch.equal(made.bits(), W)


@EACH
def test_an_adapter_that_changes_nothing(make):
    made = make(torch.bfloat16)
    with torch.no_grad():
        made.weight.view(-1)[0] = -0.0
        for lam in made.layer.randlora_lambda.values():
            lam.zero_()
    W = made.bits()
    made.merge()
    nn.init.normal_(made.layer.randlora_lambda["default"])
    made.layer.unmerge()  # the adapter has learned, and is not subtracted
    assert torch.equal(made.bits(), W) and not made.layer.merged


# ---- merged layers that are copied, moved and cast -----------------------------------------------

COPIES = {"copy": copy.deepcopy, "pickle": lambda made: pickled(made)[0]}
EACH_OF_ALL = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


@EACH_OF_ALL
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_merged_layer_unmerges_alone(make, copied):
    made = make()
    W = made.bits()
    made.merge()
    merged = made.bits()
    other = copied(made)
    learn(other.layer, 1)
    other.layer.unmerge()
    assert torch.equal(other.bits(), W)
    assert made.layer.merged and torch.equal(made.bits(), merged)
    made.layer.unmerge()
    assert torch.equal(made.bits(), W)


@EACH
def test_a_layer_that_was_merged_in_inference_mode(make):
    made = make()
    W = made.bits()
    with torch.inference_mode():
        made.merge()
    other = copy.deepcopy(made)
    made.layer.unmerge()
    other.layer.unmerge()
    assert torch.equal(made.bits(), W) and torch.equal(other.bits(), W)


CASTS = [(a, b) for a in DTYPES for b in DTYPES if a != b]


@EACH
@pytest.mark.parametrize("dtype, then", CASTS, ids=str)
def test_unmerging_and_casting_may_change_places(make, dtype, then):
    """`.to(dtype)` while merged: the old bits cannot be there; those of W.to(dtype) are."""
    made = make(dtype)
    W = made.weight.detach().clone()
    for target in (then, dtype):  # at the second merge W in its present dtype counts
        made.merge()
        made.model.to(target)
        assert made.layer.merged
        made.layer.unmerge()
        W = W.to(target)
        assert torch.equal(made.bits(), bits_of(W))


@EACH
def test_a_merged_layer_on_the_meta_device_has_nothing_to_write_into(make):
    made = make()
    W = made.bits()
    made.merge()
    away = copy.deepcopy(made)
    away.model.to("meta")
    with pytest.raises(RuntimeError, match="has no numbers"):
        away.layer.unmerge()
    assert away.layer.merged
    away.model.to_empty(device="cpu")
    away.layer.unmerge()
    assert torch.equal(away.bits(), W)


@EACH
def test_a_weight_of_another_shape_is_refused(make):
    """As if the ranks were others than when it was merged."""
    made = make()
    made.merge()
    weight = made.weight.data
    made.weight.data = weight[..., :-1]
    with pytest.raises(RuntimeError, match=r"base_layer.weight( is|.* and lies elsewhere)"):
        made.layer.unmerge()
    assert made.layer.merged
    made.weight.data = weight
    made.layer.unmerge()


@pytest.mark.parametrize("make", [Plain, OfPeft])
def test_a_weight_that_lies_otherwise_in_memory(make):
    made = make()
    made.weight.data = made.weight.data.T.contiguous().T
    W, strides = made.bits(), made.weight.stride()
    made.merge()
    made.layer.unmerge()
    assert torch.equal(made.bits(), W) and made.weight.stride() == strides


def test_a_merged_adapter_that_is_deleted():
    """As `delete_adapter` does."""
    made = OfPeft()
    W = made.bits()
    made.merge(["two"])
    del made.layer.randlora_lambda["two"], made.layer.randlora_gamma["two"]
    made.layer.unmerge()
    assert not made.layer.merged and torch.equal(made.bits(), W)


# ---- training while merged -----------------------------------------------------------------------


def warnings_and_output(made):
    """How many warnings of merged adapters that get no gradient, all at this file's line, and y."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = made.model(made.inputs())
    told = [w for w in caught if "are merged into the weight and get no grad" in str(w.message)]
    assert {w.filename for w in told} <= {__file__}
    return len(told), y


@EACH
def test_training_while_merged_is_told(make):
    """Torch's error says that the output does not require a gradient, and not why."""
    made = make()
    made.merge()
    made.model.train()
    count, y = warnings_and_output(made)
    assert count == 1 and not y.requires_grad


def merge_in_eval_mode(made):
    made.merge()
    made.model.eval()


def merge_and_unmerge(made):
    made.merge()
    made.layer.unmerge()


@EACH
@pytest.mark.parametrize("change", [lambda made: None, merge_in_eval_mode, merge_and_unmerge])
def test_what_is_not_trained_while_merged_is_not_told(make, change):
    made = make()
    change(made)
    count, y = warnings_and_output(made)
    assert count == 0 and y.requires_grad != made.layer.merged


@EACH
def test_merged_inference_without_gradients_is_not_told(make):
    made = make()
    made.merge()
    with torch.no_grad():
        count, _ = warnings_and_output(made)
    assert count == 0
