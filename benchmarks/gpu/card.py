"""The device that is measured. On the CPU (--dry) the same calls answer by the host's clock."""

import math
import re
import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]
_SMALLEST_FLUSH = 64 << 20


class Card:
    """Times calls on one device.

    `medians` gives the time on the device alone: events around the call, the L2 cache flushed
    before it. The flush (a write of four times the L2) keeps the card busy while the host launches
    what follows, and `captured` calls are one launch, so no launch gap is in these times.
    `wall` gives what a user sees: calls in a row, launches included, caches as they leave them.
    """

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda:0")
        if dry:
            self.name, self.l2_bytes = "cpu", 0
            return
        torch.cuda.set_device(self.device)
        facts = torch.cuda.get_device_properties(self.device)
        self.name, self.l2_bytes = facts.name, facts.L2_cache_size
        self._junk = torch.empty(
            max(4 * self.l2_bytes, _SMALLEST_FLUSH) // 4, dtype=torch.int32, device=self.device
        )

    def sync(self) -> None:
        if not self.dry:
            torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        """Replaces what the L2 holds."""
        if not self.dry:
            self._junk.zero_()

    def free(self) -> None:
        """Gives memory of dead tensors and graphs back, so that the next allocations fit."""
        if not self.dry:
            torch.cuda.empty_cache()

    def captured(self, call: Call) -> Call:
        """`call` as the replay of a CUDA graph (on the CPU itself); raises where it cannot be."""
        if self.dry:
            call()
            return call
        before, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(before)
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        before.wait_stream(side)
        self.sync()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own stream behind
        return graph.replay

    def _timed(self, calls: dict[str, Call]) -> dict[str, float]:
        """One round, in milliseconds."""
        if self.dry:
            times = {}
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name] = (time.perf_counter() - start) * 1e3
            return times
        events = {}
        for name, call in calls.items():
            self.flush()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            events[name] = (start, stop)
        self.sync()
        return {name: start.elapsed_time(stop) for name, (start, stop) in events.items()}

    def medians(
        self, calls: dict[str, Call], seconds: float, least: int = 5, most: int = 30
    ) -> dict[str, float]:
        """Median milliseconds of each call, made in turn for about `seconds`; one round warms up.

        In turn, so that a drift of clocks or heat meets all of them.
        """
        if self.dry:
            return self._timed(calls)
        self._timed(calls)
        end = time.monotonic() + seconds
        rounds: list[dict[str, float]] = []
        while len(rounds) < least or (len(rounds) < most and time.monotonic() < end):
            rounds.append(self._timed(calls))
        return {name: statistics.median(r[name] for r in rounds) for name in calls}

    def wall(self, call: Call, seconds: float = 0.1) -> float:
        """Milliseconds of a call among many in a row: the median of three runs."""

        def run(calls: int) -> float:
            self.sync()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            self.sync()
            return (time.perf_counter() - start) / calls

        once = run(2)
        if self.dry:
            return once * 1e3
        calls = min(max(math.ceil(seconds / 3 / once), 2), 100)
        return statistics.median(run(calls) for _ in range(3)) * 1e3

    def peak_bytes(self, call: Call) -> int | None:
        """The most memory allocated during the call beyond what was allocated before it."""
        if self.dry:
            call()
            return None
        self.sync()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.sync()
        return torch.cuda.max_memory_allocated(self.device) - before

    def kernels(self, call: Call, calls: int = 3) -> list[dict]:
        """Every kernel of a call by the profiler, dearest first: name, launches and microseconds a
        call. Calls follow each other without a flush, so these times are warm."""
        call()
        if self.dry:
            return []
        self.sync()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(calls):
                call()
            self.sync()
        rows = [
            {
                "kernel": short_name(event.key),
                "launches": round(event.count / calls, 2),
                "us": event.device_time_total / calls,
            }
            for event in profile.key_averages()
            if event.device_time_total > 0
        ]
        return sorted(rows, key=lambda row: -row["us"])


def short_name(symbol: str) -> str:
    """`fill_planes_kernel<...>` of a demangled symbol of ours; others cut to a readable length."""
    ours = re.search(r"randlora::(?:cuda::)?(?:\(anonymous namespace\)::)?(\w+)(<.*>)?\(", symbol)
    if ours:
        # Some demanglers write the 4 of a template as (int)4.
        noise = r"randlora::|\(anonymous namespace\)::|cuda::|\((int|bool|long|unsigned int)\)"
        template = re.sub(noise, "", ours[2] or "")
        return (ours[1] + template)[:80]
    return symbol.split("(")[0].removeprefix("void ")[:80]


def saved_bytes(forward: Call, state: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps for backward, but for the `state` that is there anyway (weights,
    adapters, bases). A storage counts once, however many tensors view it."""
    there = {t.untyped_storage().data_ptr() for t in state}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())
