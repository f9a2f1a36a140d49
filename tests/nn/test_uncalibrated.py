"""The warning when training of an adapter begins that nobody has calibrated."""

import copy
import warnings

import pytest
import torch
from layer_helpers import randomize
from torch import nn

import randlora_ext
from randlora_ext import calibrate

TOKENS = torch.arange(6)[None]


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 24)
        self.one, self.two = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, tokens):
        return self.two(torch.tanh(self.one(self.embedding(tokens))))


def adapted(model=None, **options):
    model = model or Words()
    return randlora_ext.apply_randlora(model, ["one", "two"], r=5, **options).train()


def told(model, x=TOKENS, steps=3):
    """Of that many steps the warnings about calibration."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(x).square().sum().backward()
    texts = [str(warning.message) for warning in seen]
    return [text for text in texts if "without calibration" in text]


def test_once_and_how_to_silence_it():
    (text,) = told(adapted())
    assert text.startswith("RandLoRA adapter 'default' is trained without calibration")
    silencing = text.rpartition("silence this: ")[2]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        exec(silencing, {"warnings": warnings})
        adapted()(TOKENS).sum().backward()
    assert not seen


def test_not_of_a_calibrated_or_a_trained_adapter():
    model = adapted()
    calibrate(model, [TOKENS])
    assert not told(model)
    assert not told(randomize(adapted()))


def test_not_of_other_bases():
    assert not told(adapted(basis="independent"))


def test_not_of_models_without_embeddings():
    numbers = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24))
    randlora_ext.apply_randlora(numbers, ["0", "1"], r=5)
    assert not told(numbers, torch.ones(2, 24))


def test_not_of_models_whose_embeddings_are_not_of_tokens():
    vision = Words()
    vision.get_input_embeddings = lambda: vision.one  # it has embeddings for its positions
    assert not told(adapted(vision))


def test_only_in_training_and_by_backward():
    model = adapted()
    with torch.no_grad():
        assert not model(TOKENS).requires_grad
    assert not told(model.eval())
    assert len(told(model.train())) == 1


def test_of_an_adapter_that_is_added_and_activated_later(tmp_path):
    randlora_ext.save_adapter(adapted(), tmp_path / "new")
    model = randomize(adapted())
    randlora_ext.load_adapter(model, tmp_path / "new", "two")
    assert not told(model)
    for layer in (model.one, model.two):
        layer.set_adapter("two")
    assert len(told(model)) == 1


def test_compiled_code_has_no_break_and_copies_work():
    torch._dynamo.reset()
    model = adapted()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert len(told(fast)) == 1
    model = adapted()
    assert not told(copy.deepcopy(model)) and len(told(model)) == 1


def test_under_peft():
    peft = pytest.importorskip("peft")
    accelerated = pytest.importorskip("randlora_ext.peft")
    accelerated.enable()
    chosen = {"r": 5, "randlora_alpha": 10, "target_modules": ["one", "two"]}
    config = accelerated.RandLoraConfig(basis="hadamard", **chosen)
    assert len(told(peft.get_peft_model(Words(), config).train())) == 1
    model = peft.get_peft_model(Words(), config).train()
    calibrate(model, [TOKENS])
    assert not told(model)
    assert not told(peft.get_peft_model(Words(), accelerated.RandLoraConfig(**chosen)).train())
