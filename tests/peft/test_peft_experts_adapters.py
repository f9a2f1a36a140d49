"""Two adapters of the fused experts of a model, of the same parameters and of others."""

import copy

import pytest
import torch
from expert_models import EXPERTS, logits, make
from peft_experts import moe
from peft_helpers import (
    accelerated,
    adapted,
    assert_unchanged,
    config,
    numbers,
)

from randlora_ext.nn.adapted_layer import layers_by_path

pytestmark = pytest.mark.filterwarnings("ignore:.*(checkpointing|use_reentrant|randlora_alpha)")


CHOICES = {
    "the same": (EXPERTS, EXPERTS[::-1]),
    "fewer": (EXPERTS, EXPERTS[:1]),
    "more": (EXPERTS[1:], EXPERTS),
    "others": (EXPERTS[:1], EXPERTS[1:]),
}


def second(model, parameters):
    """Gets an adapter "two" of other numbers and options, which is not active."""
    options = {"basis": "hadamard", "projection_prng_key": 7, "target_parameters": parameters}
    model.add_adapter("two", config(8, accelerated.RandLoraConfig, [], **options))
    return model


class Two:
    """A model of two adapters of these parameters, each alone, and their logits."""

    def __init__(self, first, other):
        self.first = moe(seed=1, target_parameters=first)
        self.both = second(moe(seed=1, target_parameters=first), other)
        options = {"r": 8, "projection_prng_key": 7, "target_parameters": other}
        self.second = adapted(make("Mixtral"), [], basis="hadamard", **options)
        alone = layers_by_path(self.second)
        for path, layer in self.layers_of("two").items():
            of = alone.pop(path)
            for part in ("randlora_lambda", "randlora_gamma"):
                getattr(layer, part)["two"].data.copy_(getattr(of, part)["default"])
        assert not alone

    def layers_of(self, name):
        found = layers_by_path(self.both).items()
        return {path: layer for path, layer in found if name in layer.randlora_lambda}


@pytest.fixture(params=CHOICES)
def two(request):
    return Two(*CHOICES[request.param])


def trains(layer):
    return layer.randlora_lambda["two"].requires_grad


def test_a_second_adapter_is_not_active(two):
    assert torch.equal(logits(two.both), logits(two.first))
    assert not any(trains(layer) for layer in two.layers_of("two").values())


def test_a_second_adapter_is_what_it_is_alone(two):
    two.both.set_adapter("two")
    assert torch.equal(logits(two.both), logits(two.second))
    assert all(trains(layer) for layer in two.layers_of("two").values())
    two.both.set_adapter("default")
    assert torch.equal(logits(two.both), logits(two.first))


def test_two_active_adapters_are_merged_together(two):
    two.both.base_model.set_adapter(["default", "two"])
    both, before = logits(two.both), numbers(two.both)
    assert not torch.equal(both, logits(two.first))
    two.both.merge_adapter()
    assert (logits(two.both) - both).abs().max() < 1e-5 * both.abs().max()
    two.both.unmerge_adapter()
    assert_unchanged(two.both, before)


def test_merging_one_after_the_other_is_undone_at_once(two):
    two.both.set_adapter("two")
    before = numbers(two.both)
    two.both.merge_adapter()
    assert torch.equal(logits(two.both), logits(two.second))
    two.both.merge_adapter(adapter_names=["default"])
    assert not torch.equal(logits(two.both), logits(two.second))
    two.both.unmerge_adapter()
    assert_unchanged(two.both, before)


def test_deleting_the_one_leaves_the_other(two):
    two.both.delete_adapter("default")
    assert two.both.active_adapters == ["two"]
    assert torch.equal(logits(two.both), logits(two.second))
    assert not [name for name in two.both.state_dict() if name.endswith(".default")]


def test_a_model_of_two_adapters_is_unloaded(two):
    two.both.set_adapter("two")
    want = logits(two.second)
    assert torch.equal(logits(copy.deepcopy(two.both).merge_and_unload()), want)
    assert torch.equal(logits(two.both.unload()), logits(make("Mixtral")))


def test_a_new_second_adapter_changes_nothing_yet():
    model = second(moe(seed=1), EXPERTS)
    model.set_adapter("two")
    assert torch.equal(logits(model), logits(make("Mixtral")))
