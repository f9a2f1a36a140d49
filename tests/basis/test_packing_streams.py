"""What is packed once is used on every stream: the cache waits, and a capture may not fill it.

A stand-in for CUDA's streams, as there is no card here; tests/gpu/test_gpu_runtime.py has one.
"""

from contextlib import nullcontext
from unittest.mock import Mock, call

import pytest
import torch

from randlora_ext.basis import cache

CARD = torch.device("cuda", 0)


@pytest.fixture
def events(monkeypatch):
    events = []
    stream = Mock(synchronize=lambda: events.append("waited"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: "capture" in events)
    return events


def packed(number, events):
    def make():
        events.append("made")
        return [torch.zeros(1)]

    return cache.get_or_make(("streams", number), CARD, make)


def test_memory_outlives_what_other_streams_enqueued(events, monkeypatch):
    # Freed memory is reused at once on the stream that packed, unless others are recorded.
    packs, trains, serves = (Mock(cuda_stream=handle) for handle in (0, 16, 32))
    tensors = [Mock(), Mock()]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: packs)
    held = cache.get_or_make(("streams", 4), CARD, lambda: tensors)
    for stream in (packs, trains, trains, serves, packs, trains):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_, stream=stream: stream)
        assert held.on_current_stream() is tensors
    once = [call(stream) for stream in (packs, trains, serves)]
    assert all(tensor.record_stream.mock_calls == once for tensor in tensors)


def test_a_capture_fills_no_cache_and_what_is_cached_is_complete(events):
    events.append("capture")
    with pytest.raises(RuntimeError, match="call the layer once before"):
        packed(2, events)
    assert events == ["capture"] and ("streams", 2) not in cache._cache
    events.clear()
    held = packed(2, events)
    assert held is packed(2, events) and events == ["made", "waited"]
