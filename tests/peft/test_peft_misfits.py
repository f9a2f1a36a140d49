"""Files that fit a model in part, or not at all: what is told, and that nothing stays changed."""

import pytest
import torch
from peft_helpers import (
    Headed,
    adapted,
    assert_unchanged,
    edited,
    made,
    numbers,
    opened,
)
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:RandLoRA layers multiply by dense")

SEED = {"basis": "independent", "density": 0.2, "projection_prng_key": 7}
HEAD = {"modules_to_save": ["head"], "base": Headed}
BOTH_NAMES = pytest.mark.parametrize("name", ["default", "two"], ids=["over", "new"])


@pytest.fixture
def headed(tmp_path):
    made(seed=3, **SEED, **HEAD).save_pretrained(tmp_path)
    return made(**SEED, **HEAD)


@BOTH_NAMES
def test_a_module_to_save_that_the_file_lacks(tmp_path, headed, name):
    with edited(tmp_path) as state:
        del state["base_model.model.head.bias"]
    before = numbers(headed)
    with pytest.raises(KeyError, match=r"model\.head\.bias"):  # PEFT's
        headed.load_adapter(tmp_path, name)
    assert_nothing_is_left(headed, before)


@BOTH_NAMES
def test_a_tensor_of_another_shape(tmp_path, headed, name):
    with edited(tmp_path) as state:
        state["base_model.model.c.randlora_gamma"] = torch.ones(3, 24)
    before = numbers(headed)
    with pytest.raises(RuntimeError, match=f"c.randlora_gamma.{name} is"):
        headed.load_adapter(tmp_path, name)
    assert_nothing_is_left(headed, before)


def assert_nothing_is_left(model, before):
    if "two" in model.peft_config:
        model.delete_adapter("two")  # which PEFT has added before it reads the tensors
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"] and model.active_adapter == "default"


def blocks(count):
    made = (nn.ModuleDict({name: nn.Linear(24, 24) for name in "qv"}) for _ in range(count))
    return nn.Sequential(*made)


def load_anew(folder, count, targets):
    return opened(folder, lambda: blocks(count))


def load_beside(folder, count, targets):
    model = adapted(blocks(count), targets, sparse=True)
    model.load_adapter(folder, "two")
    return model


def load_over(folder, count, targets):
    model = adapted(blocks(count), targets, sparse=True)
    model.load_adapter(folder, "default")
    return model


EVERY_WAY = pytest.mark.parametrize("way", [load_anew, load_beside, load_over])


class TestFilesThatFitInPart:
    """Stock PEFT says nothing of tensors without a place, and little of those that are missing."""

    def warnings(self, folder, recwarn, way, count, targets="q"):
        """Of loading an adapter of two blocks into a model of `count` blocks."""
        adapted(blocks(2), "q", sparse=True).save_pretrained(folder)
        way(folder, count, targets)
        return [str(w.message) for w in recwarn if "only in part" in str(w.message)]

    @EVERY_WAY
    def test_a_file_that_fits_is_not_warned_of(self, tmp_path, recwarn, way):
        assert self.warnings(tmp_path, recwarn, way, 2) == []

    @EVERY_WAY
    def test_tensors_without_a_place_are_told(self, tmp_path, recwarn, way):
        (message,) = self.warnings(tmp_path, recwarn, way, 1)
        assert "2 tensors have no place" in message
        assert "model.1.q.randlora_lambda" in message and "stay as they were" not in message

    @EVERY_WAY
    def test_missing_tensors_are_told(self, tmp_path, recwarn, way):
        (message,) = self.warnings(tmp_path, recwarn, way, 3)
        assert "2 tensors of the adapter are missing and stay as they were" in message
        assert "model.2.q.randlora_lambda" in message and "no place" not in message

    def test_both_are_told(self, tmp_path, recwarn):
        alone, missing = self.warnings(tmp_path, recwarn, load_over, 2, "v")
        assert "4 tensors have no place" in alone and "4 tensors of the" in missing

    @pytest.mark.parametrize("way, name", [(load_anew, "default"), (load_beside, "two")])
    def test_what_no_file_has_filled_changes_nothing(self, tmp_path, way, name):
        adapted(blocks(2), "q", sparse=True).save_pretrained(tmp_path)
        model = way(tmp_path, 3, "q")
        assert not model.base_model.model[2]["q"].randlora_lambda[name].any()
