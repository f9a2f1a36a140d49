"""What is packed once is used on every stream: the cache waits, and a capture may not fill it.

A stand-in for CUDA's streams, as there is no card here; tests/gpu/test_gpu_runtime.py has one.
"""

from contextlib import nullcontext

import pytest
import torch

from randlora_ext.basis import cache

CARD = torch.device("cuda", 0)


@pytest.fixture
def events(monkeypatch):
    events = []

    class Stream:
        def synchronize(self):
            events.append("waited")

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: "capture" in events)
    return events


def made(events):
    events.append("made")
    return [torch.zeros(1)]


class Recorded:
    """A tensor that tells which streams it was recorded for."""

    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream)


def test_memory_outlives_what_other_streams_enqueued(events, monkeypatch):
    # Freed memory is reused at once on the stream that packed, unless others are recorded.
    class Stream:
        def __init__(self, handle):
            self.cuda_stream = handle

        def synchronize(self):
            pass

    packs, trains, serves = Stream(0), Stream(16), Stream(32)
    current = [packs]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current[0])
    tensors = [Recorded(), Recorded()]
    held = cache.get_or_make(("streams", 4), CARD, lambda: tensors)
    for stream in (packs, trains, trains, serves, packs, trains):
        current[0] = stream
        assert held.on_current_stream() is tensors
    assert [t.streams for t in tensors] == [[packs, trains, serves]] * 2  # once each


def test_what_is_cached_is_complete(events):
    held = cache.get_or_make(("streams", 1), CARD, lambda: made(events))
    again = cache.get_or_make(("streams", 1), CARD, lambda: made(events))
    assert held is again and events == ["made", "waited"]


def test_a_capture_fills_no_cache(events):
    events.append("capture")
    with pytest.raises(RuntimeError, match="call the layer once before"):
        cache.get_or_make(("streams", 2), CARD, lambda: made(events))
    assert events == ["capture"] and ("streams", 2) not in cache._cache
    events.clear()
    assert cache.get_or_make(("streams", 2), CARD, lambda: made(events)).tensors


def test_tensors_on_the_cpu_wait_for_nothing(events):
    held = cache.get_or_make(("streams", 3), torch.device("cpu"), lambda: made(events))
    assert held.on_current_stream() is held.tensors and events == ["made"]
