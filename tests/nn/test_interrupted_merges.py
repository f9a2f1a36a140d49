"""Ctrl-C anywhere in merging and unmerging: W comes back, bit for bit, and nothing is lost."""

import copy

import pytest
import torch
from mergeable import ALL, Plain, interrupts, learn

pytestmark = pytest.mark.filterwarnings("ignore")  # "Already unmerged", and those of bitsandbytes

EACH = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
# Every line of the package, and every instruction of Python's machine where the state changes.
EVERYWHERE = pytest.mark.parametrize(
    "watched, event", [("randlora_ext", "line"), ("nn/merging.py", "opcode")], ids=["lines", "ops"]
)


class Bits:
    """Of W, and of W + dW, as a merge that nothing interrupts leaves them."""

    def __init__(self, fresh):
        self.W = fresh.bits()
        made = copy.deepcopy(fresh)
        made.merge()
        self.merged = made.bits()
        assert not torch.equal(self.W, self.merged)


def assert_sound(made, bits):
    """Whatever it says, W is there or comes back, and everything can be done again."""
    assert torch.equal(made.bits(), bits.W) or made.layer.merged
    if made.layer.merged:
        learn(copy.deepcopy(made).layer, 1)
        made.layer.unmerge()
        assert torch.equal(made.bits(), bits.W)
    made.merge()
    assert made.layer.merged and torch.equal(made.bits(), bits.merged)
    made.layer.unmerge()
    assert not made.layer.merged and torch.equal(made.bits(), bits.W)


@EACH
@EVERYWHERE
def test_a_merge_that_is_interrupted(make, watched, event):
    fresh = make()
    bits, states = Bits(fresh), set()
    made = copy.deepcopy(fresh)
    for _ in interrupts(made.merge, watched, event):
        states.add(made.layer.merged)
        assert_sound(made, bits)
    assert states == {False, True}
    assert torch.equal(made.bits(), bits.merged)  # the last one, which nothing interrupts


@EACH
@EVERYWHERE
def test_an_unmerge_that_is_interrupted(make, watched, event):
    made = make()
    bits, states = Bits(made), set()
    made.merge()
    for _ in interrupts(made.layer.unmerge, watched, event):
        states.add(made.layer.merged)
        assert_sound(made, bits)
        made.merge()
    assert states == {False, True}
    assert torch.equal(made.bits(), bits.W)


@EACH
def test_an_unmerge_that_is_interrupted_again_and_again(make):
    """Each time where it was not yet, and without anything in between."""
    made = make()
    bits = Bits(made)
    made.merge()
    for _ in interrupts(made.layer.unmerge, "nn/merging.py"):
        assert torch.equal(made.bits(), bits.W) or made.layer.merged
        if not made.layer.merged:
            break
    assert torch.equal(made.bits(), bits.W) and not made.layer.merged


@EVERYWHERE
def test_a_merge_beside_a_merged_adapter(watched, event):
    """Of the second of two adapters under PEFT."""
    made = ALL["PEFT"]()
    bits = Bits(made)
    made.merge(["default"])
    for _ in interrupts(lambda: made.merge(["two"]), watched, event):
        assert "default" in made.layer.merged_adapters
        assert_sound(made, bits)
        made.merge(["default"])


def test_a_model_of_peft():
    """Of several layers, of which some were merged when Ctrl-C came."""
    peft_helpers = pytest.importorskip("peft_helpers")
    model = peft_helpers.made(basis="hadamard")
    before = peft_helpers.numbers(model)
    for call in (model.merge_adapter, model.unmerge_adapter):
        counts = set()
        for _ in interrupts(call, "nn/merging.py"):
            counts.add(sum(layer.merged for layer in peft_helpers.layers(model)))
            model.unmerge_adapter()
            peft_helpers.assert_unchanged(model, before)
            if call == model.unmerge_adapter:
                model.merge_adapter()
        assert counts == {0, 1, 2, 3}


def test_what_an_interrupted_merge_kept_is_never_restored():
    """W may have changed since, as by an optimizer or `load_state_dict`."""
    made = Plain()
    for _ in interrupts(made.merge):
        if made.layer.merged:
            made.layer.unmerge()
        with torch.no_grad():
            made.weight.add_(1)
        changed = made.bits()
        made.merge()
        made.layer.unmerge()
        assert torch.equal(made.bits(), changed)
