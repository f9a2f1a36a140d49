"""What the GPU tests share.

They run on a card, or in dry mode on the CPU: RANDLORA_CUDA_SERVES_CPU=1 with the CUDA library
compiled for the CPU (CONTRIBUTING.md). There too the CPU kernels can be reached.
"""

import functools
import os
from contextlib import contextmanager

import pytest
import torch
from layer_cases import Layer, ours
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only, tree_structure

from randlora_ext import _C

DRY = os.environ.get("RANDLORA_CUDA_SERVES_CPU") == "1"

cases = functools.partial(pytest.mark.parametrize, ids=str)


@contextmanager
def cpu_kernels():
    """Within, operators on CPU tensors run the CPU kernels, in dry mode as well."""
    if not DRY:
        yield
        return
    library = os.environ["RANDLORA_CUDA_LIBRARY"]
    _C.load_cuda(library, False)
    try:
        yield
    finally:
        _C.load_cuda(library, True)


def moved(value, device):
    """Tensors, also in lists and tuples, on `device`; all else as it is."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


def on_both(device, function, *arguments):
    """(what the card makes of it, what the CPU kernels make of it), both on the CPU."""
    with cpu_kernels():
        want = function(*arguments)
    return moved(function(*moved(arguments, device)), "cpu"), want


def same(got, want) -> bool:
    """Equal to the last bit, NaN included."""
    if tree_structure(got) != tree_structure(want):
        return False
    return all(
        a.dtype == b.dtype and torch.equal(*(t.contiguous().view(torch.uint8) for t in (a, b)))
        for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True)
    )


def run_linear(layer: Layer, device) -> dict[str, Tensor]:
    """y, dx, dlam and dgam on `device`, back on the CPU."""
    return {name: t.cpu() for name, t in ours(layer.to(device)).items()}
