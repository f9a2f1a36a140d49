"""Timing one layer, forward and backward, in several ways: `--bench` and benchmarks/layer.py."""

import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import peft
import torch
from torch import Tensor, nn

from .. import TernaryBasis, build_info, explain
from ..functional import linear
from ..reference import linear_reference

SCALING = 20.0  # PEFT's default, alpha / r = 640 / 32


class Ours(nn.Module):
    """The fused operator on a frozen layer; the benchmark fixes the path where asked to."""

    def __init__(self, base: nn.Linear, basis: TernaryBasis, path: str = "auto"):
        super().__init__()
        self.base, self.basis, self.path = base, basis, path
        self.lam = nn.Parameter(torch.randn(basis.r, basis.n) * 0.1)
        self.gam = nn.Parameter(torch.full((basis.n, basis.d), 1 / max(basis.n, basis.d)))

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.base.weight, self.base.bias
        return linear(x, w, b, self.basis, self.lam, self.gam, SCALING, self.path)


def density_of(text: str, d: int) -> float:
    """A number, a fraction, or PEFT's very_sparse (1 / sqrt(d))."""
    if text == "very_sparse":
        return 1 / math.sqrt(d)
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1)


def compare(
    size: tuple[int, int],
    tokens: int,
    density: str,
    *,
    dtype: torch.dtype = torch.float32,
    rank: int = 32,
    repeats: int = 9,
    paths: Sequence[str] = (),
) -> dict:
    """Times every method for one layer, verified first; x requires a gradient as inside a model.

    The methods take turns (frozen, LoRA, PEFT, ours, frozen, ...), so that drift of the machine
    hits all of them. Medians; those of methods over the frozen layer's.

    Args:
        size: (in, out).
        density: as of `density_of`. PEFT's cost does not depend on it, since its bases are dense.
        paths: time ours on these paths rather than other methods.

    Raises RuntimeError where ours does not compute what the float64 reference does.
    """
    torch.manual_seed(0)
    n_in, n_out = size
    base = nn.Linear(n_in, n_out).to(dtype).requires_grad_(False)
    basis = TernaryBasis(n_in, n_out, rank, density_of(density, min(size)))
    methods: dict[str, nn.Module] = {"frozen": base}
    if paths:
        methods |= {path: Ours(base, basis, path) for path in paths}
    else:
        methods |= _of_peft(base, rank, density)
        methods["ours"] = Ours(base, basis)

    x = torch.randn(tokens, n_in, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, n_out, dtype=dtype)
    error = verify(next(m for m in reversed(methods.values()) if isinstance(m, Ours)), x)
    medians = _time(methods, x, dy, repeats)
    result: dict[str, Any] = {
        "in": n_in,
        "out": n_out,
        "tokens": tokens,
        "density": density,
        "dtype": str(dtype).removeprefix("torch."),
        "path": explain(basis, tokens, dtype).path,
        "error": error,
        "frozen_ms": medians["frozen"] * 1e3,
    }
    for name, median in medians.items():
        if name != "frozen":
            result[name] = median / medians["frozen"]
    if paths:  # what the choice of the cost model loses against the best path
        result["regret"] = result[result["path"]] / min(result[path] for path in paths) - 1
    return result


def verify(ours: Ours, x: Tensor) -> float:
    """Largest relative error of the output and of the gradients against the fp64 reference."""
    A, B = ours.basis.dense(dtype=torch.float64)
    lam, gam = (p.detach().double().requires_grad_() for p in (ours.lam, ours.gam))
    x64 = x.detach()[:64].double().requires_grad_()
    weight, bias = ours.base.weight.double(), ours.base.bias.double()
    want = linear_reference(x64, weight, bias, A, B, lam, gam, SCALING)
    x1 = x.detach()[:64].clone().requires_grad_()
    got = ours(x1)
    dy = torch.randn_like(got)
    want_grads = torch.autograd.grad(want, [x64, lam, gam], dy.double())
    got_grads = torch.autograd.grad(got, [x1, ours.lam, ours.gam], dy)
    error = max(
        float((g.detach().double() - w.detach()).norm() / w.detach().norm())
        for g, w in zip([got, *got_grads], [want, *want_grads], strict=True)
    )
    limit = 1e-4 if x.dtype is torch.float32 else 3e-2
    if not error < limit:
        raise RuntimeError(f"verification failed: relative error {error:.2e}, limit {limit:.0e}")
    return error


def machine() -> dict:
    """What somebody else needs to compare timings."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line for line in lines if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        **build_info(),
    }


def _of_peft(base: nn.Linear, rank: int, density: str) -> dict[str, nn.Module]:
    lora = peft.LoraConfig(r=rank, target_modules=["1"])
    kind = {"very_sparse": True} if density == "very_sparse" else {"sparse": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save")
        config = peft.RandLoraConfig(r=rank, target_modules=["1"], save_projection=False, **kind)
    return {"lora": _wrapped(base, lora), "peft": _wrapped(base, config)}


def _wrapped(base: nn.Linear, config: peft.PeftConfig) -> nn.Module:
    """A copy of `base` as the only layer of a PEFT model, its adapter away from zero."""
    copy = nn.Linear(base.in_features, base.out_features, dtype=base.weight.dtype)
    copy.load_state_dict(base.state_dict())
    model = peft.get_peft_model(nn.Sequential(nn.Linear(1, 1), copy), config)
    layer = model.base_model.model[1]
    for name, parameter in layer.named_parameters():
        if "lora_B" in name or "randlora_lambda" in name:
            nn.init.normal_(parameter, std=0.1)
    return layer


def _time(methods: dict[str, nn.Module], x: Tensor, dy: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of a step by method; two rounds before are not counted.

    Each turn begins with a call that is not counted either: the caches and the allocator's free
    pages then are those of this method, as in training, and not of the one before.
    """
    calls = min(60, max(1, int(1e9 / (x.numel() * dy.shape[1] + 1e6))))
    times: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 2):
        for name, layer in methods.items():
            leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
            for call in range(calls + 1):
                if call == 1:
                    start = time.perf_counter()
                for leaf in leaves:
                    leaf.grad = None
                layer(x).backward(dy)
            if repeat >= 2:
                times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(seconds) for name, seconds in times.items()}
