"""Timing one layer, forward and backward, in several ways: `--bench` and benchmarks/layer.py."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from .. import build_info, explain
from ..cost import PATHS
from ..reference import linear_reference
from .methods import SCALING, Ours, frozen_layer, make


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
    hits all of them. Medians; those of methods over the frozen layer's.

    Args:
        size: (in, out).
        density: as of `methods.density_of`, after "balanced:" for balanced bases.
        methods: of `methods.METHODS`. With all our paths among them the result has "regret": what
            the choice of the cost model loses against the best path.

    Raises RuntimeError where one of ours does not compute what the float64 reference does.
    """
    n_in, n_out = size
    base = frozen_layer(size, dtype)
    layers = {name: make(name, base, rank, density) for name in ("frozen", *methods)}
    x = torch.randn(tokens, n_in, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, n_out, dtype=dtype)
    ours = [layer for layer in layers.values() if isinstance(layer, Ours)]
    error = verify(ours, x) if ours else 0.0
    medians = _time(layers, x, dy, repeats)
    result: dict[str, Any] = {
        "in": n_in,
        "out": n_out,
        "tokens": tokens,
        "density": density,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if ours:
        result |= {"path": explain(ours[0].basis, tokens, dtype).path, "error": error}
    result["frozen_ms"] = medians["frozen"] * 1e3
    result |= {name: medians[name] / medians["frozen"] for name in methods}
    paths = PATHS if dtype == torch.float32 else PATHS[:2]  # 16 bits: merging would round dW away
    if set(paths) <= set(methods):
        result["regret"] = result[result["path"]] / min(result[path] for path in paths) - 1
    return result


def verify(layers: Sequence[Ours], x: Tensor) -> float:
    """Largest relative error of outputs and gradients against the fp64 reference, which they share.

    All layers get the diagonals of the first.
    """
    first = layers[0]
    A, B = first.basis.dense(dtype=torch.float64)
    lam, gam = (p.detach().double().requires_grad_() for p in (first.lam, first.gam))
    x64 = x.detach()[:64].double().requires_grad_()
    weight, bias = first.base.weight.double(), first.base.bias.double()
    want = linear_reference(x64, weight, bias, A, B, lam, gam, SCALING)
    dy = torch.randn_like(want).to(x.dtype)
    wanted = [want, *torch.autograd.grad(want, [x64, lam, gam], dy.double())]
    limit = 1e-4 if x.dtype is torch.float32 else 3e-2
    worst = 0.0
    for layer in layers:
        layer.load_state_dict(first.state_dict())
        x1 = x.detach()[:64].clone().requires_grad_()
        got = layer(x1)
        grads = torch.autograd.grad(got, [x1, layer.lam, layer.gam], dy)
        for name, g, w in zip(("y", "dx", "dlam", "dgam"), (got, *grads), wanted, strict=True):
            error = float((g.detach().double() - w.detach()).norm() / w.detach().norm())
            if not error < limit:
                raise RuntimeError(
                    f"verification failed: relative error {error:.2e} of {name} by path "
                    f"{layer.path}, limit {limit:.0e}"
                )
            worst = max(worst, error)
    return worst


def machine() -> dict:
    """What somebody else needs to compare timings."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "commit": _commit(),
        **build_info(),
    }


def _processor() -> str:
    if not os.path.exists("/proc/cpuinfo"):
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    said = {key.strip(): value.strip() for key, _, value in pairs}
    if "model name" not in said:
        return platform.machine()
    # Clouds shorten the name; family and model tell the generation.
    return f"{said['model name']} (family {said.get('cpu family')}, model {said.get('model')})"


def _commit() -> str:
    """Of the checkout that the package lies in; "-dirty" where its sources differ from it."""
    package = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "-uno", "--", ".", "../csrc")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
    return f"{commit}-dirty" if changed else commit


def _time(methods: dict[str, nn.Module], x: Tensor, dy: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of a step by method; one round before is not counted.

    Each turn begins with a call that is not counted either: the caches and the allocator's free
    pages then are those of this method, as in training, and not of the one before. Where a step
    takes several tenths of a second that is nothing to it, and is left out.
    """
    work = x.numel() * dy.shape[1]
    calls = min(60, max(1, int(1e9 / (work + 1e6))))
    warm = int(work < 8e9)
    times: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, layer in methods.items():
            leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
            for call in range(calls + warm):
                if call == warm:
                    start = time.perf_counter()
                for leaf in leaves:
                    leaf.grad = None
                layer(x).backward(dy)
            if repeat:
                times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(seconds) for name, seconds in times.items()}
