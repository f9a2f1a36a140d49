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


KINDS = pytest.mark.parametrize("kind", [Ours, OfPeft])


def learn(layer, seed):
    """Other numbers of about the same size in every adapter."""
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for diagonals in (layer.randlora_lambda, layer.randlora_gamma):
            for p in diagonals.values():
                p.mul_(1 + torch.randn(p.shape, generator=make).to(p.dtype) / 2)


@KINDS
@pytest.mark.parametrize("dtype, keep", zip(DTYPES, ["host", "device"] * 2, strict=True))
def test_every_bit_comes_back_after_the_adapters_have_changed(kind, dtype, keep):
    made = kind(dtype)
    layer = made.layer
    with torch.no_grad():
        made.weight[0, :4] = torch.tensor([-0.0, 0.0, 1e-7, -1e4])
    W = bits(made.weight)
    orders = [[["default"]], [["two"]], [["default", "two"]], [["two"], ["default"]], [None]]
    for seed, steps in enumerate(orders):
        for names in steps:
            made.merge(names, keep_weight=keep)
        assert not torch.equal(bits(made.weight), W)
        held = weakref.ref(layer._kept)
        assert (held().dtype, held().device.type) == (dtype, "cpu")
        assert not any("kept" in key for key in layer.state_dict())
        assert all(p is not held() for p in [*layer.parameters(), *layer.buffers()])
        learn(layer, seed)
        layer.unmerge()
        assert torch.equal(bits(made.weight), W), steps
        assert not layer.merged and layer._kept is None
        assert held() is None


@KINDS
def test_an_adapter_that_changes_nothing_keeps_nothing(kind):
    made = kind(torch.bfloat16)
    layer, weight = made.layer, made.weight
    with torch.no_grad():
        weight[0, 0] = -0.0
        layer.randlora_lambda["two"].zero_()
    W = bits(weight)
    made.merge(["two"])
    assert layer.merged_adapters == ["two"] and layer._kept is None
    assert torch.equal(bits(weight), W)
    nn.init.normal_(layer.randlora_lambda["two"])
    layer.unmerge()  # the adapter has learned, and is not subtracted
    assert torch.equal(bits(weight), W) and not layer.merged


@KINDS
@pytest.mark.parametrize("kept", ["default", "two"])
def test_what_is_kept_comes_back_beside_what_is_subtracted(kind, kept):
    made = kind(torch.float32)
    layer, W = made.layer, made.weight.detach().clone()
    for name in ("default", "two"):
        made.merge([name], keep_weight="host" if name == kept else "nothing")
    if kept == "two":  # whose change is not in the weight that was kept
        nn.init.normal_(layer.randlora_lambda["two"])
    layer.unmerge()
    assert relative(made.weight, W) < 1e-6


@KINDS
def test_a_copy_of_a_merged_layer_unmerges_too(kind):
    made = kind(torch.bfloat16)
    layer, W = made.layer, bits(made.weight)
    with torch.inference_mode():  # what is kept there is no inference tensor
        made.merge()
    for other in (copy.deepcopy(layer), pickled(layer)[0]):
        learn(other, 1)
        other.unmerge()
        assert torch.equal(bits(other.get_base_layer().weight), W)
        assert layer.merged and not torch.equal(bits(made.weight), W)
    layer.unmerge()
    assert torch.equal(bits(made.weight), W)


@KINDS
@pytest.mark.parametrize(
    "dtype, then", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_unmerging_and_casting_may_change_places(kind, dtype, then):
    """`.to(dtype)` while merged: the old bits cannot be there; those of W.to(dtype) are."""
    made = kind(dtype)
    layer, W = made.layer, made.weight.detach().clone()
    for target in (then, dtype):  # at the second merge W in its present dtype counts
        made.merge()
        layer.to(target)
        layer.unmerge()
        W = W.to(target)
        assert torch.equal(made.weight, W)


@pytest.mark.parametrize(
    "kind, action, keep, again",
    [
        (OfPeft, "merge", "nothing", 0),
        (OfPeft, "unmerge", "host", 0),
        *((Ours, "merge", "host", again) for again in range(9)),  # as many write again
        *((Ours, "unmerge", "nothing", again) for again in range(9)),
    ],
)
def test_after_ctrl_c_weight_and_state_agree(kind, action, keep, again):
    fresh, states = kind(torch.bfloat16), set()
    W, merged = fresh.weight.detach().clone(), copy.deepcopy(fresh)
    merged.merge()

    def start():
        made = copy.deepcopy(fresh)
        if action == "unmerge":
            made.merge(keep_weight=keep)
        return made

    def call():
        made.layer.unmerge() if action == "unmerge" else made.merge(keep_weight=keep)

    made = start()
    for _ in interrupts(call, merging.__file__, again):
        layer, weight = made.layer, made.weight
        states.add(layer.merged)
        assert not layer.merged or torch.equal(weight, merged.weight)
        if layer.merged:
            learn(layer, 1) if keep == "host" else None
            layer.unmerge()
        assert torch.equal(weight, W) if keep == "host" else relative(weight, W) < 0.02
        with torch.no_grad():  # what an interrupted merge left behind is never restored
            weight.add_(1)
        one_more = weight.detach().clone()
        made.merge(keep_weight="host")
        layer.unmerge()
        assert torch.equal(weight, one_more)
        made = start()
    assert states == {True, False}


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


@pytest.mark.filterwarnings("always")
@KINDS
def test_training_while_merged_is_told(kind):
    """Torch's error says that the output does not require a gradient, and not why."""

    def told(x, made):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = made.layer(x)
        found = [
            w for w in caught if "are merged into the weight and get no grad" in str(w.message)
        ]
        assert {w.filename for w in found} <= {__file__}
        return len(found), y.requires_grad

    made, x = kind(torch.float32), torch.randn(3, 24)
    assert told(x, made) == (0, True)
    made.merge()
    assert told(x, made) == (1, False)
    with torch.no_grad():
        assert told(x, made) == (0, False)
    made.layer.eval()
    assert told(x, made) == (0, False)
    made.layer.train()
    made.layer.unmerge()
    assert told(x, made) == (0, True)
