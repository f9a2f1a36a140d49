"""Timing one layer, forward and backward, in several ways, each verified first."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from methods import frozen_layer, make
from torch import Tensor, nn

from randlora_ext.diagnostics import LIMITS, relative_error


def compare(
    size: tuple[int, int],
    tokens: int,
    density: str,
    *,
    dtype: torch.dtype = torch.float32,
    rank: int = 32,
    repeats: int = 9,
    methods: Sequence[str] = ("lora", "peft", "ours"),
) -> dict:
    """Times every method for one layer, verified first; x requires a gradient as inside a model.

    The methods take turns (frozen, LoRA, PEFT, ours, frozen, ...), so that drift of the machine
    hits all of them. Medians; those of methods are divided by the frozen layer's.

    Args:
        size: (in, out).
        density: as of `methods.density_of`.
        methods: of `methods.METHODS`.

    Raises RuntimeError if one of ours disagrees with the float64 reference.
    """
    n_in, n_out = size
    base = frozen_layer(size, dtype)
    layers = {name: make(name, base, rank, density) for name in ("frozen", *methods)}
    x = torch.randn(tokens, n_in, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, n_out, dtype=dtype)
    error = relative_error(layers["ours"].basis, 64, dtype, x.device) if "ours" in layers else 0.0
    if not error <= LIMITS[dtype]:
        raise RuntimeError(f"verification failed: relative error {error:.1e}")
    medians = _time(layers, x, dy, repeats)
    result: dict[str, Any] = {
        "in": n_in,
        "out": n_out,
        "tokens": tokens,
        "density": density,
        "rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if "ours" in layers:
        result["error"] = error
    result["frozen_ms"] = medians["frozen"] * 1e3
    result |= {name: medians[name] / medians["frozen"] for name in methods}
    return result


def _time(methods: dict[str, nn.Module], x: Tensor, dy: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of a step by method; one round before is not counted.

    Each turn begins with a call that is not counted either: the caches and the allocator's free
    pages then are those of this method, as in training, and not of the one before. If a step takes
    several tenths of a second, this makes no difference, and the call is left out.

    With one thread processor time counts, so that other programs disturb less.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    work = x.numel() * dy.shape[1]
    calls = min(60, max(1, int(1e9 / (work + 1e6))))
    warm = int(work < 8e9)
    times: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, layer in methods.items():
            leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
            for call in range(calls + warm):
                if call == warm:
                    start = clock()
                for leaf in leaves:
                    leaf.grad = None
                layer(x).backward(dy)
            if repeat:
                times[name].append((clock() - start) / calls)
    return {name: statistics.median(seconds) for name, seconds in times.items()}
