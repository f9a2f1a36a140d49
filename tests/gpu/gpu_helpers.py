"""The CPU kernels beside the card's, and the rule by which the two are compared.

The tests here run on a card, or in dry mode on the CPU: RANDLORA_CUDA_SERVES_CPU=1 with the CUDA
library compiled for the CPU (docs/cuda-on-cpu.md). There too the CPU kernels can be reached.
"""

import functools
import os
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from layer_cases import DENSITIES as DENSITIES
from layer_cases import NAMES, Layer, exact, largest_error, ours, plain, rms_error
from torch import Tensor

from randlora_ext import _C

ops = torch.ops.randlora
DRY = os.environ.get("RANDLORA_CUDA_SERVES_CPU") == "1"
ALL_TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOW = [torch.float32, torch.bfloat16, torch.float16]
# As layer_cases.SHAPES, fewer: square, wide, tall, overhanging last base, r > d, n > 64, and sizes
# beyond one tile of every kernel.
SHAPES = [
    (64, 64, 8), (50, 37, 7), (37, 50, 7), (136, 72, 8), (33, 130, 16), (72, 136, 8), (101, 67, 1),
    (20, 24, 32), (1, 1, 1),
]  # fmt: skip

cases = functools.partial(pytest.mark.parametrize, ids=str)


def in_turn(last: list, *others: list) -> list[tuple]:
    """The product of `others`, each case with one more value: those of `last` take turns, so that
    each of them meets each value of the others."""
    return [
        (*(value for _, value in case), last[sum(at for at, _ in case) % len(last)])
        for case in product(*map(enumerate, others))
    ]


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
    if isinstance(want, (list, tuple)):
        return len(got) == len(want) and all(map(same, got, want))
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    return torch.equal(bits(got), bits(want))


def bits(t: Tensor) -> Tensor:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.contiguous().view(kind)


def run_linear(layer: Layer, device) -> dict[str, Tensor]:
    """y, dx, dlam and dgam on `device`, back on the CPU."""
    return {name: t.cpu() for name, t in ours(layer.to(device)).items()}


def run_linear_by_cpu_kernels(layer: Layer) -> dict[str, Tensor]:
    with cpu_kernels():
        return run_linear(layer, "cpu")


def assert_as_by_cpu_kernels(
    layer: Layer, device, bound: float, error=largest_error
) -> dict[str, Tensor]:
    """Returns what the CPU kernels make of it."""
    got, want = run_linear(layer, device), run_linear_by_cpu_kernels(layer)
    for name in NAMES:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        assert error(got[name], want[name]) <= bound, (name, len(layer.x))
    return want


def assert_parity(layer: Layer, device, floor: float = 1.0) -> None:
    """The rule of the CPU tests, with the CPU kernels as a second measure: each result errs at most
    twice as much as plain PyTorch or the CPU kernels do, whichever more, plus `floor` eps."""
    got, kernels = run_linear(layer, device), run_linear_by_cpu_kernels(layer)
    oracle, simple = exact(layer), plain(layer)
    for name in NAMES:
        value = got[name]
        assert value.dtype == kernels[name].dtype and value.shape == oracle[name].shape, name
        error = rms_error(value, oracle[name])
        allowed = max(rms_error(t[name], oracle[name]) for t in (simple, kernels))
        bound = 2 * allowed + floor * torch.finfo(layer.x.dtype).eps
        assert error <= bound, f"{name} errs by {error:.3g}, allowed are {bound:.3g}"
