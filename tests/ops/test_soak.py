"""A hundred and fifty steps of soak.py (ten thousand by hand), and every operator 240 times."""

import soak
import torch


def test_memory_does_not_grow():
    torch.manual_seed(0)
    before, after = soak.soak(150)
    # Of the whole process, which other tests have filled: resident memory says nothing here.
    assert soak.grown(before | {"resident": 0}, after | {"resident": 0}) == [], (before, after)
