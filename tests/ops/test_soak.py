"""A hundred and fifty steps of soak.py (ten thousand by hand), and every operator 240 times."""

import gc
from itertools import pairwise

import pytest
import soak
import torch
from layer_cases import KINDS, imported_basis, make_layer, ours

from randlora_ext import Basis, delta_weight, merged_weight, scaled_basis


def test_memory_does_not_grow():
    torch.manual_seed(0)
    before, after = soak.soak(150)
    # Of the whole process, which other tests have filled: resident memory says nothing here.
    assert soak.grown(before | {"resident": 0}, after | {"resident": 0}) == [], (before, after)


@pytest.mark.parametrize("kind", KINDS)
def test_no_operator_keeps_memory(kind):
    layer = make_layer(11, 70, 3, kind, 2, torch.float32)
    basis, low = layer.basis, layer.weight.half()
    leaves = [t.requires_grad_() for t in (layer.lam, layer.gam)]

    def call():
        ours(layer)
        for function in (delta_weight, scaled_basis):
            torch.autograd.grad(function(basis, *leaves).sum(), leaves)
        merged_weight(basis, low, *leaves)
        if isinstance(kind, float):
            imported_basis(*basis.dense(), 11, 70).packed()
            Basis(11, 70, 3, kind, seed=1).dense()

    growth = []
    gc.freeze()  # what other tests left behind need not be searched
    for _ in range(5):  # a leak grows every time, a pool of Python's does not
        gc.collect()
        growth.append(soak.allocated())
        for _ in range(60):
            call()
    gc.unfreeze()
    # Of the smallest block that malloc hands out, 32 bytes, not one in four calls.
    assert min(after - before for before, after in pairwise(growth)) < 8 * 60, growth
