"""The cache of packed tensors, which layers of equal bases share."""

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes


class PackedTensors:
    """A list that allows weak references: the cache drops it when its last layer goes."""

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        self.tensors = tensors
        self._device = device if device.type == "cuda" else None
        self._recorded: set[int] = set()

    def on_current_stream(self) -> list[Tensor]:
        """The tensors. Their memory is not reused before the current stream has read it.

        torch's allocator knows only the stream that packed them. Any other stream must be recorded
        once: freed memory then waits for the work enqueued there before it was freed.
        """
        if self._device is not None:
            stream = torch.cuda.current_stream(self._device)
            if stream.cuda_stream not in self._recorded:
                with ordinary_tensors():
                    for tensor in self.tensors:
                        tensor.record_stream(stream)
                self._recorded.add(stream.cuda_stream)
        return self.tensors


_cache: "weakref.WeakValueDictionary[tuple, PackedTensors]" = weakref.WeakValueDictionary()
# Re-entrant: making a dense B asks for the packed tensors.
_cache_lock = threading.RLock()


def _new_lock() -> None:
    global _cache_lock
    _cache_lock = threading.RLock()


# A forked process (a DataLoader's worker) lacks the thread that may hold the lock.
os.register_at_fork(after_in_child=_new_lock)


def get_or_make(
    key: tuple, device: torch.device, make: Callable[[], list[Tensor]]
) -> PackedTensors:
    """The packed tensors under `key`, made once and kept as long as something holds them."""
    with _cache_lock:
        packed = _cache.get(key)
        if packed is None:
            with ordinary_tensors(), _complete_for_every_stream(device):
                packed = _cache[key] = PackedTensors(make(), device)
        return packed


@contextmanager
def _complete_for_every_stream(device: torch.device) -> Iterator[None]:
    """Synchronizes before it ends: a cached tensor may be used from any stream."""
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
def ordinary_tensors() -> Iterator[None]:
    """Computes plain tensors inside torch.export, torch.func transforms and inference_mode too.

    Cached tensors outlive the caller's context. Fake tensors, functorch wrappers and inference
    tensors (which cannot be saved for a later backward) must not get into the cache.
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
    """`device` with its index, so that "cuda" and "cuda:0" share one entry."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
