"""Three hundred steps of soak.py; the ten thousand are run by hand."""

import pytest
import soak
import torch

from randlora_ext import RandLoraLinear

pytestmark = pytest.mark.usefixtures("one_thread")


def test_memory_does_not_grow():
    torch.manual_seed(0)
    before, after = soak.soak(300)
    # Of the whole process, which other tests have filled: resident memory says nothing here.
    assert soak.grown(before | {"resident": 0}, after | {"resident": 0}) == [], (before, after)


@pytest.mark.parametrize("leak", ["a tensor", "a basis"])
def test_a_leak_is_found(monkeypatch, leak):
    kept = []
    visit = soak.Trainer.visit

    def leaking(self, number):
        visit(self, number)
        if leak == "a tensor":
            kept.append(torch.empty(1000))
        else:
            layer = RandLoraLinear(torch.nn.Linear(8, 8), 2, projection_prng_key=len(kept))
            kept.append(layer.bases["default"])
            layer(torch.randn(1, 8))

    monkeypatch.setattr(soak.Trainer, "visit", leaking)
    before, after = soak.soak(60)
    growing = soak.grown(before | {"resident": 0}, after | {"resident": 0})
    assert {"a tensor": "tensors", "a basis": "packed"}[leak] in growing
