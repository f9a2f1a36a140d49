"""Times calls on one device; on the CPU (--dry) by the host's clock."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
_SMALLEST_FLUSH = 64 << 20
_HELD = 100_000_000  # clock cycles: about 50 ms, longer than the host takes to launch a phase


class Card:
    """The first CUDA card, or the CPU if `dry`.

    `medians` gives the time on the card alone: events around each call, the L2 cache flushed before
    it. The flush writes four times the L2, which also keeps the card busy while the host launches
    the call. A call made by `captured` is one launch, so its time has no launch gaps.
    """

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda:0")
        if dry:
            return
        torch.cuda.set_device(self.device)
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._junk = torch.empty(max(4 * l2, _SMALLEST_FLUSH), dtype=torch.int8, device=self.device)

    def sync(self) -> None:
        if not self.dry:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Returns the memory of dead tensors and graphs, so that the next allocations fit."""
        if not self.dry:
            torch.cuda.empty_cache()

    def captured(self, call: Call) -> Call:
        """`call` as the replay of a CUDA graph, which holds the memory of its results; on the CPU
        `call` itself."""
        if self.dry:
            call()
            return call
        before, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(before)
        with torch.cuda.stream(side):
            for _ in range(2):
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

    def _round(self, calls: dict[str, Call]) -> dict[str, float]:
        """Milliseconds of each call, made once."""
        if self.dry:
            times = {}
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name] = (time.perf_counter() - start) * 1e3
            return times
        events = {}
        for name, call in calls.items():
            self._junk.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            events[name] = (start, stop)
        self.sync()
        return {name: start.elapsed_time(stop) for name, (start, stop) in events.items()}

    def medians(self, calls: dict[str, Call], rounds: int = 15) -> dict[str, float]:
        """Median milliseconds of each call over `rounds`, after one to warm up.

        The calls take turns, so that a drift of clocks or heat affects all of them.
        """
        if self.dry:
            return self._round(calls)
        self._round(calls)
        made = [self._round(calls) for _ in range(rounds)]
        return {name: statistics.median(times[name] for times in made) for name in calls}

    def wall(self, call: Call, calls: int = 10) -> float:
        """Milliseconds of a call among many in a row: launches included, caches as they fall."""
        if self.dry:
            calls = 1
        call()
        self.sync()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        self.sync()
        return (time.perf_counter() - start) / calls * 1e3

    def apart(self, phases: Sequence[Call], rounds: int = 8) -> tuple[float, float]:
        """Median milliseconds of the host and of the device for phases that follow one another.

        Host: processor time of all threads until a phase's last launch returns, the card idle
        before. Device: events around launches that wait behind a delay, so that the card never
        waits for the host (it holds about a thousand launches: split a long step into phases).
        """
        host, device = [], []
        for _ in range(1 if self.dry else rounds):
            host.append(sum(map(self._launching, phases)))
            device.append(sum(map(self._held, phases)))
        return statistics.median(host), statistics.median(device)

    def _launching(self, phase: Call) -> float:
        self.sync()
        start = time.process_time()
        phase()
        return (time.process_time() - start) * 1e3

    def _held(self, phase: Call) -> float:
        self.sync()
        if self.dry:
            return self._round({"": phase})[""]
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HELD)
        start.record()
        phase()
        stop.record()
        self.sync()
        return start.elapsed_time(stop)
