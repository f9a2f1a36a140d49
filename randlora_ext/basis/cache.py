"""The cache of what layers of equal bases share: packed tensors, and the bases themselves."""

import functools
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from .packed import Packed


def ordinary_tensors(function: Callable) -> Callable:
    """`function`, run so that it computes plain tensors, whatever the caller's context is.

    Fake tensors of torch.export, wrappers of torch.func and inference tensors must not get into a
    cache. All of these are states of a thread, and a new thread has none.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.no_grad()(function), *args, **kwargs).result()

    return run


class PackedTensors:
    """Holds tensors and allows weak references: the cache drops it when its last layer goes."""

    def __init__(self, tensors: Packed, device: torch.device) -> None:
        self.tensors = tensors
        self._device = device if device.type == "cuda" else None
        self._recorded: set[int] = set()

    def on_current_stream(self) -> Packed:
        """The tensors. Their memory is not reused before the current stream has read it.

        torch's allocator knows only the stream that packed them. Any other stream must be recorded
        once: freed memory then waits for the work enqueued there before it was freed.
        """
        if self._device is not None:
            stream = torch.cuda.current_stream(self._device)
            if stream.cuda_stream not in self._recorded:
                for tensor in self.tensors:
                    ordinary_tensors(tensor.record_stream)(stream)
                self._recorded.add(stream.cuda_stream)
        return self.tensors


T = TypeVar("T")

# What is alive, by what decides it: packed tensors, and objects that layers share.
_cache: "weakref.WeakValueDictionary[tuple, Any]" = weakref.WeakValueDictionary()
_cache_lock = threading.Lock()


def _new_lock() -> None:
    global _cache_lock
    _cache_lock = threading.Lock()


# A forked process (a DataLoader's worker) lacks the thread that may hold the lock.
os.register_at_fork(after_in_child=_new_lock)


def share(key: tuple, make: Callable[[], T]) -> T:
    """The living object under `key`, or a new one."""
    found = _cache.get(key)
    return _cache.setdefault(key, make()) if found is None else found


def get_or_make(key: tuple, device: torch.device, make: Callable[[], Packed]) -> PackedTensors:
    """The packed tensors under `key`, made once and kept as long as something holds them. `make`
    runs in a thread of its own while this one has the lock, so it must not call `get_or_make`."""
    with _cache_lock:
        return share(key, lambda: PackedTensors(_made_for_every_stream(device, make), device))


def _made_for_every_stream(device: torch.device, make: Callable[[], Packed]) -> Packed:
    """Waits for what `make` enqueues: a cached tensor may be used from any stream."""
    if device.type != "cuda":
        return ordinary_tensors(make)()
    with torch.cuda.device(device):
        # A captured packing would not run before the replay, in memory that belongs to the graph.
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "randlora: a basis cannot be packed while a CUDA graph is captured; call the layer "
                "once before, or Basis.packed(device)"
            )
        stream = torch.cuda.current_stream()

        @ordinary_tensors
        def make_on_stream() -> Packed:
            with torch.cuda.stream(stream):
                return make()

        tensors = make_on_stream()
        stream.synchronize()
        return tensors
