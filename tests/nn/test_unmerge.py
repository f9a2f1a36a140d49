"""Unmerging restores every bit of W, whatever happened since: our own layers and PEFT's."""

import copy
import warnings
import weakref

import pytest
import torch
from layer_helpers import interrupts, make_base, pickled, relative, two_adapters
from torch import nn

from randlora_ext.nn import merging

# PEFT warns of second and of unmerged adapters.
pytestmark = pytest.mark.filterwarnings("ignore:.*merg")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def bits(weight):
    """W as bytes: equal numbers may differ in the sign of zero, and NaN equals nothing."""
    return weight.detach().contiguous().view(torch.uint8).clone()


class Ours:
    """Two adapters, "default" and "two", on a layer of ours, and below on one of PEFT's."""

    def __init__(self, dtype):
        self.layer = two_adapters(dtype)
        self.layer.set_adapter(["default", "two"])

    @property
    def weight(self):
        return self.layer.get_base_layer().weight

    def merge(self, names=None, **options):
        self.layer.merge(adapter_names=names, **options)


class OfPeft(Ours):
    def __init__(self, dtype):
        peft_helpers = pytest.importorskip("peft_helpers")
        base = nn.Sequential(make_base(24, 40, dtype=dtype))
        self.model = peft_helpers.adapted(base, ["0"], sparse=True)
        second = peft_helpers.config(5, targets=["0"], sparse=True, randlora_alpha=50)
        self.model.add_adapter("two", second)
        self.model.base_model.set_adapter(["default", "two"])
        (self.layer,) = peft_helpers.layers(peft_helpers.randomize(self.model))


BOTH = pytest.mark.parametrize("make", [Ours, OfPeft])


def learn(layer, seed):
    """Other numbers of about the same size in every adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for diagonals in (layer.randlora_lambda, layer.randlora_gamma):
            for p in diagonals.values():
                p.mul_(1 + torch.randn(p.shape, generator=generator).to(p.dtype) / 2)


ORDERS = [[["default"]], [["two"]], [["default", "two"]], [["two"], ["default"]], [None]]


@BOTH
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("dtype, keep", zip(DTYPES, ["host", "device"] * 2, strict=True))
def test_every_bit_comes_back_after_the_adapters_have_changed(make, dtype, keep, order):
    made = make(dtype)
    with torch.no_grad():
        made.weight[0, :4] = torch.tensor([-0.0, 0.0, 1e-7, -1e4])
    W = bits(made.weight)
    for seed in range(2):
        for names in order:
            made.merge(names, keep_weight=keep)
        assert not torch.equal(bits(made.weight), W)
        learn(made.layer, seed)
        made.layer.unmerge()
        assert torch.equal(bits(made.weight), W)


@BOTH
@pytest.mark.parametrize("dtype, keep", zip(DTYPES, ["host", "device"] * 2, strict=True))
def test_what_is_kept_is_no_part_of_the_module(make, dtype, keep):
    made = make(dtype)
    made.merge(keep_weight=keep)
    layer, kept = made.layer, made.layer._kept.weight
    assert (kept.dtype, kept.device.type) == (dtype, "cpu")
    assert not any("kept" in key for key in layer.state_dict())
    assert all(tensor is not kept for tensor in [*layer.parameters(), *layer.buffers()])


@BOTH
def test_unmerging_frees_what_was_kept(make):
    made = make(torch.float32)
    made.merge()
    kept = weakref.ref(made.layer._kept.weight)
    made.layer.unmerge()
    assert not made.layer.merged and made.layer._kept.weight is None and kept() is None


@BOTH
def test_an_adapter_that_changes_nothing_keeps_nothing(make):
    made = make(torch.bfloat16)
    layer, weight = made.layer, made.weight
    with torch.no_grad():
        weight[0, 0] = -0.0
        layer.randlora_lambda["two"].zero_()
    W = bits(weight)
    made.merge(["two"])
    assert layer.merged_adapters == ["two"] and layer._kept.weight is None
    assert torch.equal(bits(weight), W)
    nn.init.normal_(layer.randlora_lambda["two"])
    layer.unmerge()  # the adapter has learned, and is not subtracted
    assert torch.equal(bits(weight), W) and not layer.merged


@BOTH
@pytest.mark.parametrize("kept", ["default", "two"])
def test_what_is_kept_comes_back_beside_what_is_subtracted(make, kept):
    made = make(torch.float32)
    layer, W = made.layer, made.weight.detach().clone()
    for name in ("default", "two"):
        made.merge([name], keep_weight="host" if name == kept else "nothing")
    if kept == "two":  # whose change is not in the weight that was kept
        nn.init.normal_(layer.randlora_lambda["two"])
    layer.unmerge()
    assert relative(made.weight, W) < 1e-6


COPIES = {"copy": copy.deepcopy, "pickle": lambda layer: pickled(layer)[0]}


@BOTH
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_merged_layer_unmerges_alone(make, copied):
    made = make(torch.bfloat16)
    layer, W = made.layer, bits(made.weight)
    with torch.inference_mode():  # what is kept there is no inference tensor
        made.merge()
    other = copied(layer)
    learn(other, 1)
    other.unmerge()
    assert torch.equal(bits(other.get_base_layer().weight), W)
    assert layer.merged and not torch.equal(bits(made.weight), W)
    layer.unmerge()
    assert torch.equal(bits(made.weight), W)


@BOTH
@pytest.mark.parametrize(
    "dtype, then", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_unmerging_and_casting_may_change_places(make, dtype, then):
    """`.to(dtype)` while merged: the old bits cannot be there; those of W.to(dtype) are."""
    made = make(dtype)
    layer, W = made.layer, made.weight.detach().clone()
    for target in (then, dtype):  # at the second merge W in its present dtype counts
        made.merge()
        layer.to(target)
        layer.unmerge()
        W = W.to(target)
        assert torch.equal(made.weight, W)


@pytest.mark.parametrize(
    "make, action, keep, again",
    [
        (OfPeft, "merge", "nothing", 0),
        (OfPeft, "unmerge", "host", 0),
        *((Ours, "merge", "host", again) for again in range(9)),  # as many write again
        *((Ours, "unmerge", "nothing", again) for again in range(9)),
    ],
)
def test_after_ctrl_c_weight_and_state_agree(make, action, keep, again):
    fresh, states = make(torch.bfloat16), set()
    W, merged = fresh.weight.detach().clone(), copy.deepcopy(fresh)
    merged.merge()

    def start():
        made = copy.deepcopy(fresh)
        if action == "unmerge":
            made.merge(keep_weight=keep)
        return made

    def call():
        if action == "unmerge":
            made.layer.unmerge()
        else:
            made.merge(keep_weight=keep)

    made = start()
    for _ in interrupts(call, merging.__file__, again):
        layer, weight = made.layer, made.weight
        states.add(layer.merged)
        if layer.merged:
            assert torch.equal(weight, merged.weight)
            if keep == "host":
                learn(layer, 1)
            layer.unmerge()
        if keep == "host":
            assert torch.equal(weight, W)
        else:
            assert relative(weight, W) < 0.02
        assert_that_what_an_interrupted_merge_kept_is_never_restored(made)
        made = start()
    assert states == {True, False}


def assert_that_what_an_interrupted_merge_kept_is_never_restored(made):
    with torch.no_grad():
        made.weight.add_(1)
    changed = made.weight.detach().clone()
    made.merge(keep_weight="host")
    made.layer.unmerge()
    assert torch.equal(made.weight, changed)


@pytest.mark.parametrize("keep", ["host", "nothing"])
def test_a_merged_adapter_that_is_deleted(keep):
    """As by PEFT up to 0.20; without a kept W it stays in the weight, and that is told."""
    made = OfPeft(torch.float32)
    W = made.weight.detach().clone()
    made.merge(["two"], keep_weight=keep)
    merged = made.weight.detach().clone()
    del made.layer.randlora_lambda["two"], made.layer.randlora_gamma["two"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.layer.unmerge()
    told = [str(w.message) for w in caught if "['two'] were deleted while merged" in str(w.message)]
    assert len(told) == (keep == "nothing") and not made.layer.merged
    assert torch.equal(made.weight, W if keep == "host" else merged)


def warnings_and_output(made):
    """How many warnings of merged adapters that get no gradient, all at this file's line, and y."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = made.layer(torch.randn(3, 24))
    told = [w for w in caught if "are merged into the weight and get no grad" in str(w.message)]
    assert {w.filename for w in told} <= {__file__}
    return len(told), y


@BOTH
def test_training_while_merged_is_told(make):
    """Torch's error says that the output does not require a gradient, and not why."""
    made = make(torch.float32)
    made.merge()
    count, y = warnings_and_output(made)
    assert count == 1 and not y.requires_grad


def merge_in_eval_mode(made):
    made.merge()
    made.layer.eval()


def merge_and_unmerge(made):
    made.merge()
    made.layer.unmerge()


@BOTH
@pytest.mark.parametrize("change", [lambda made: None, merge_in_eval_mode, merge_and_unmerge])
def test_what_is_not_trained_while_merged_is_not_told(make, change):
    made = make(torch.float32)
    change(made)
    count, y = warnings_and_output(made)
    assert count == 0 and y.requires_grad != made.layer.merged


@BOTH
def test_merged_inference_without_gradients_is_not_told(make):
    made = make(torch.float32)
    made.merge()
    with torch.no_grad():
        count, _ = warnings_and_output(made)
    assert count == 0
