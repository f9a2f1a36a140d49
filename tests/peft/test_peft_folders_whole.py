"""One format: what is trained whole beside the adapter, such as heads and biases."""

import json

import pytest
import torch
from language_models import llama
from peft_helpers import PEFT, Deep, Headed, accelerated, adapted, opened, randomize, shake
from safetensors.torch import load_file, save_file
from same_adapters import X, assert_same
from torch import nn

from randlora_ext import apply_randlora, load_adapter, save_adapter

pytestmark = pytest.mark.usefixtures("stock_peft")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


# ---- modules_to_save -----------------------------------------------------------------------------


class Normed(Headed):
    """With a head that has buffers, and a module whose name another one ends with."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(40), nn.Linear(40, 3))
        self.norm, self.prenorm = nn.LayerNorm(24), nn.LayerNorm(24)

    def forward(self, x):
        return super().forward(self.norm(self.prenorm(x)))


@pytest.fixture
def of_peft(tmp_path):
    """A model with modules_to_save, trained in all that it saves, buffers too."""
    model = adapted(Normed(), "ab", basis="hadamard", modules_to_save=["head", "prenorm"])
    shake(model)
    model.train()(torch.randn(50, 24))
    model.save_pretrained(tmp_path)
    return model


def test_modules_to_save_from_peft(tmp_path, of_peft):
    assert_same(load_adapter(Normed(), tmp_path), of_peft)


def test_modules_to_save_from_peft_are_trained(tmp_path, of_peft):
    named = load_adapter(Normed(), tmp_path).named_parameters()
    trained = {name for name, p in named if p.requires_grad and "randlora_" not in name}
    whole = {name for name, _ in Normed().named_parameters() if name.startswith(("head", "pre"))}
    assert trained == whole


def test_a_file_that_lacks_a_part_of_a_module_to_save(tmp_path, of_peft):
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["base_model.model.head.1.bias"]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="it lacks head.1.bias, though modules_to_save has 'head'"):
        load_adapter(Normed(), tmp_path)


WHOLE = [
    (Headed, ["head"], ["head"]),
    (Normed, ["prenorm", "head.1"], ["head.1", "prenorm"]),
    (Normed, ["prenorm", "norm"], ["prenorm"]),  # PEFT would take "prenorm" for "norm", too
    (Normed, ["norm"], None),
]


EVERY_WHOLE = pytest.mark.parametrize("base, whole, listed", WHOLE, ids=str)


def with_modules_to_save(base, whole, folder):
    """Saved."""
    model = randomize(apply_randlora(base(), ["a", "b"], r=5, modules_to_save=whole))
    shake(model)
    save_adapter(model, folder)
    return model


@EVERY_WHOLE
def test_the_configuration_lists_what_peft_can_name(tmp_path, base, whole, listed):
    with_modules_to_save(base, whole, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == listed


@EVERY_WHOLE
def test_modules_to_save_from_ours(tmp_path, base, whole, listed):
    model = with_modules_to_save(base, whole, tmp_path)
    accelerated.enable()
    assert_same(opened(tmp_path, base), model)


@EVERY_WHOLE
def test_modules_to_save_from_ours_without_peft(tmp_path, base, whole, listed):
    model = with_modules_to_save(base, whole, tmp_path)
    assert_same(load_adapter(base(), tmp_path), model)


@EVERY_WHOLE
@torch.no_grad()
def test_what_peft_cannot_name_it_puts_into_the_base_model(tmp_path, base, whole, listed):
    with_modules_to_save(base, whole, tmp_path)
    accelerated.enable()
    served = opened(tmp_path, base).eval()
    with served.disable_adapter():
        is_plain = torch.equal(served(X), base().eval()(X))
    assert is_plain == (listed == sorted(whole))


def test_a_trained_module_whose_weight_is_tied(tmp_path):
    """PEFT would train a copy of it, to which the head would not be tied."""
    base = lambda: llama(tie_word_embeddings=True)  # noqa: E731
    model = randomize(apply_randlora(base(), ["q_proj"], r=4, modules_to_save=["embed_tokens"]))
    shake(model)
    save_adapter(model, tmp_path)
    accelerated.enable()
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        want = model.eval()(tokens).logits
        for served in (opened(tmp_path, base), load_adapter(base(), tmp_path)):
            assert torch.equal(served.eval()(tokens).logits, want)


# ---- biases --------------------------------------------------------------------------------------


@pytest.fixture
def with_biases(tmp_path):
    """Saved, with two trained biases."""
    model = randomize(apply_randlora(Deep(), ["a", "b"], r=5))
    model.a.base_layer.bias.requires_grad_(True)
    model.c.bias.requires_grad_(True)
    shake(model)
    save_adapter(model, tmp_path)
    return model


def test_a_bias_that_was_trained_along_is_saved(tmp_path, with_biases):
    saved = load_file(tmp_path / WEIGHTS)
    assert {name for name in saved if "bias" in name} == {
        "base_model.model.a.base_layer.bias",
        "base_model.model.c.bias",
    }


def test_peft_opens_a_bias_that_was_trained_along(tmp_path, with_biases):
    accelerated.enable()
    assert_same(opened(tmp_path), with_biases)


def test_a_bias_that_was_trained_along_comes_back_and_is_trained(tmp_path, with_biases):
    again = load_adapter(Deep(), tmp_path)
    assert_same(again, with_biases)
    assert again.a.base_layer.bias.requires_grad and not again.b.base_layer.bias.requires_grad


@pytest.mark.skipif(PEFT < (0, 21), reason="PEFT 0.20 saves no biases")
@pytest.mark.parametrize("bias", ["all", "randlora_only"])
def test_biases_from_peft(tmp_path, bias):
    model = adapted(Deep(), "ab", basis="hadamard", bias=bias)
    shake(model)
    model.save_pretrained(tmp_path)
    assert_same(load_adapter(Deep(), tmp_path), model)


# ---- the head of a language model ----------------------------------------------------------------


def test_the_base_weight_of_an_adapted_head_is_not_trained(tmp_path):
    """PEFT saves it, too, if it has the name of an embedding layer."""
    model = adapted(llama(), ["lm_head", "q_proj"], basis="hadamard")
    with torch.no_grad():
        model.get_submodule("base_model.model.lm_head").base_layer.weight.add_(1)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    served = load_adapter(llama(), tmp_path)
    assert not served.lm_head.base_layer.weight.requires_grad
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        assert torch.equal(served(tokens).logits, model.eval()(tokens).logits)
