"""Bit planes of generated matrices, and the cache of packed tensors that layers share."""

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from . import _C

_ops = torch.ops.randlora


def signed_seed(name: str, seed: int) -> int:
    """The same 64 bits as the signed integer that an operator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name} must be an integer in [0, 2**64), got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"{name} must be in [0, 2**64), got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def generate_planes(
    seed: int,
    role: int,
    row_start: int,
    rows: int,
    col_start: int,
    cols: int,
    density: float,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Bit planes (2, rows, ceil(cols / 64)) of any slice of basis `role` (0 = A, 1 = B).

    Equivalent to slicing the infinite matrix of docs/basis-spec.md; independent of layer shapes.
    """
    planes = torch.empty((2, rows, -(-cols // 64)), dtype=torch.int64, device=device)
    signed, limit = signed_seed("seed", seed), _C.threshold(density)
    _ops.fill_planes_(planes, signed, role, row_start, col_start, cols, limit)
    return planes


class Packed:
    """Holds packed tensors, so that a weak reference can tell when the last layer let go."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors


_cache: "weakref.WeakValueDictionary[tuple, Packed]" = weakref.WeakValueDictionary()
# Re-entrant, since making a dense B takes what is packed.
_cache_lock = threading.RLock()


def _new_lock() -> None:
    global _cache_lock
    _cache_lock = threading.RLock()


# A forked process (a DataLoader's worker) has none of the threads that might let go of the lock.
os.register_at_fork(after_in_child=_new_lock)


def shared(key: tuple, device: torch.device, make: Callable[[], list[Tensor]]) -> Packed:
    """The packed tensors under `key`, made once for as long as anybody holds them."""
    with _cache_lock:
        packed = _cache.get(key)
        if packed is None:
            with for_real(), _complete(device):
                packed = _cache[key] = Packed(make())
        return packed


@contextmanager
def _complete(device: torch.device) -> Iterator[None]:
    """What is made within is there for every stream of `device`: those who find it in the cache
    cannot know on which one it was made."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        # A captured packing would not run before the replay, in memory that belongs to the graph.
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "randlora: a basis cannot be packed while a CUDA graph is captured; call the layer "
                "once before, or TernaryBasis.packed(device) and .dense_b(device, dtype)"
            )
        yield
        torch.cuda.current_stream().synchronize()


@contextmanager
def for_real() -> Iterator[None]:
    """Computes ordinary constants, whatever the caller is in the middle of.

    What is cached outlives that: an export's fake tensors, a transform's wrappers, or tensors of
    inference_mode (which cannot be saved for a later backward) must not get into it.
    """
    with (
        torch._C.DisableTorchFunction(),
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


def with_index(device: torch.device) -> torch.device:
    """`device` with its index spelled out, so that "cuda" and "cuda:0" share."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
