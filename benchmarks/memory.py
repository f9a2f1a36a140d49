"""The peak of memory of one method's training step, for a process of its own (Linux)."""

import ctypes
import gc
from pathlib import Path

import torch
from methods import frozen_layer, make

MIB = 2**20


def peak_mib(
    method: str, size: tuple[int, int], tokens: int, density: str, dtype: torch.dtype, rank: int
) -> float:
    """Peak MiB of a step, minus those before the layer was made: weights and x count.

    Memory that making the layer used and freed does not: the kernel's record of the peak is reset
    after a first step, when everything that lasts (packed bases, MKL's buffers) is there.
    """
    free_unused()
    before = status("VmRSS")
    layer = make(method, frozen_layer(size, dtype), rank, density)
    x = torch.randn(tokens, size[0], dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, size[1], dtype=dtype)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for step in range(3):
        for leaf in leaves:
            leaf.grad = None
        if step == 1:
            free_unused()
            Path("/proc/self/clear_refs").write_text("5")
        layer(x).backward(dy)
    return (status("VmHWM") - before) / MIB


def free_unused() -> None:
    """Gives freed memory back to the system, where it would still count as resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def status(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak (ru_maxrss would count its parent's)."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024
