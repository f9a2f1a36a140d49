"""Measures this machine's `Rates` for the choice of a path (randlora_ext/ops/rates.py).

    python benchmarks/calibrate.py      about two minutes on an idle machine

Each of our products is timed beside the frozen layer's GEMMs of the same size, in turn, and the
rates are the least-squares fit of costs.py's terms to those times.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial

import torch
from methods import basis_of
from torch import Tensor
from torch.nn.functional import linear as frozen_linear

from randlora_ext.ops.costs import path_terms
from randlora_ext.ops.rates import Rates

_ops = torch.ops.randlora
NAMES = tuple(field.name for field in fields(Rates))
RANK = 32
SIZES = ((1024, 1024), (2048, 2048), (1024, 2048))
BASES = ("1/48", "0.07", "1/3", "block:1/4", "block:1/8", "block:1/16", "dense")
TOKENS = 512
DTYPES = {"fp32": torch.float32, "16bit": torch.bfloat16}


def _seconds(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, float]:
    """Medians, the calls taken in turn so that drift of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def measure_size(
    size: tuple[int, int],
    density: str,
    dtype: torch.dtype,
    device: str,
    repeats: int,
) -> list[tuple[dict[str, float], float]]:
    """(how often each rate is paid, units measured) of the factored products and of forming dW.

    In 16 bits, also those of forming W + dW with stochastic rounding.
    """
    n_in, n_out = size
    basis = basis_of(density, size, RANK)
    packed, by_gemm = basis.packed(device), basis.kind in ("block", "dense")
    if by_gemm:
        packed = [*packed[: 1 if basis.kind == "dense" else 2], basis.dense_b(device, dtype)]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x, dy, weight = random(TOKENS, n_in), random(TOKENS, n_out), random(n_out, n_in)
    lam, gam = random(basis.r, basis.n), random(basis.n, basis.d)

    def factored() -> None:
        _ops.linear(x, None, None, lam, gam, packed, 1.0, n_out, "factored")
        _ops.linear_backward(dy, x, None, lam, gam, packed, 1.0, "factored", True, True)

    def form(rounds: bool = False) -> None:
        for _ in range(2):
            if rounds:
                _ops.merged_weight(weight, lam, gam, packed, 1.0, 0)
            else:
                _ops.delta_weight(lam, gam, packed, 1.0, n_out, n_in)
        if by_gemm:  # as linear.cpp does for so few tokens
            _ops.linear_backward(dy, x, None, lam, gam, packed, 1.0, "factored", False, True)
        else:
            _ops.delta_weight_backward(weight, lam, gam, packed, 1.0)

    def frozen() -> None:
        frozen_linear(x, weight)
        dy @ weight

    calls: dict[str, Callable] = {"frozen": frozen, "factored": factored, "delta": form}
    if dtype.itemsize == 2:
        calls["rounded"] = partial(form, rounds=True)
    seconds = _seconds(calls, repeats, device)
    unit = seconds["frozen"] / 2
    terms = path_terms(basis, TOKENS, device, dtype)
    paid = {path: rates for path, (_, rates) in terms.items()}
    paid["rounded"] = paid["delta"] | {"round_entry": 1 / TOKENS}
    return [(paid[name], seconds[name] / unit) for name in calls if name != "frozen"]


def fit(samples: list[tuple[dict[str, float], float]]) -> tuple[Rates, float]:
    """Non-negative rates by least squares of relative errors, and the worst relative error.

    A rate that would be negative is taken out, and so is one that no sample pays: both are 0.
    """
    counts = torch.tensor([[paid.get(name, 0.0) for name in NAMES] for paid, _ in samples])
    measured = torch.tensor([units for _, units in samples])
    matrix = (counts / measured[:, None]).double()
    used = [i for i in range(len(NAMES)) if bool(counts[:, i].any())]
    while True:
        scale = matrix[:, used].norm(dim=0)
        ones = torch.ones(len(samples), 1, dtype=torch.float64)
        solution = torch.linalg.lstsq(matrix[:, used] / scale, ones).solution[:, 0] / scale
        if bool((solution >= 0).all()):
            break
        del used[int(solution.argmin())]
    values = torch.zeros(len(NAMES), dtype=torch.float64)
    values[used] = solution
    error = float((matrix @ values - 1).abs().max())
    return Rates(*values.tolist()), error


def calibrate(device: str, repeats: int) -> None:
    for bits, dtype in DTYPES.items():
        samples = []
        for size in SIZES:
            for density in BASES:
                samples += measure_size(size, density, dtype, device, repeats)
        measured, error = fit(samples)
        rounded = ", ".join(f"{name}={value:.3g}" for name, value in asdict(measured).items())
        print(f"{device} {bits}, off by {error:.0%} at worst: Rates({rounded})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    calibrate(args.device, args.repeats)


if __name__ == "__main__":
    main()
