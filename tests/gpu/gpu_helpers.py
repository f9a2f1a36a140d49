"""What the GPU tests share.

They run on a card, or in dry mode on the CPU: RANDLORA_CUDA_SERVES_CPU=1 with the CUDA library
compiled for the CPU (docs/cuda-on-cpu.md). There too the CPU kernels can be reached.
"""

import functools
import os
from contextlib import contextmanager

import pytest
import torch
from layer_cases import Layer, ours
from torch import Tensor

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
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(v, device) for v in value)
    return value


def on_both(device, function, *arguments):
    """(what the card makes of it, what the CPU kernels make of it), both on the CPU."""
    with cpu_kernels():
        want = function(*arguments)
    return moved(function(*moved(arguments, device)), "cpu"), want


def same(got, want) -> bool:
    """Equal to the last bit, NaN included."""
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(same(got[k], want[k]) for k in want)
    if isinstance(want, (list, tuple)):
        return len(got) == len(want) and all(map(same, got, want))
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    return torch.equal(*(t.contiguous().view(torch.uint8) for t in (got, want)))


def run_linear(layer: Layer, device) -> dict[str, Tensor]:
    """y, dx, dlam and dgam on `device`, back on the CPU."""
    return {name: t.cpu() for name, t in ours(layer.to(device)).items()}
