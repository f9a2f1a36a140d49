"""A hundred and fifty steps of soak.py; ten thousand by hand."""

import soak
import torch


def test_memory_does_not_grow():
    torch.manual_seed(0)
    # Of the whole process, which other tests have filled: resident memory says nothing here.
    growth = soak.soak(150) | {"resident": 0}
    assert all(growth[name] <= limit for name, limit in soak.LIMITS.items()), growth
