"""What Hadamard bases must add to a frozen layer's step, and may be expected to, row by row.

    python benchmarks/hadamard_floors.py                the rows of results/layer-xeon-spr.json
    python benchmarks/hadamard_floors.py FILE.json      those of `layer.py --hadamard --out FILE`

Two floors over the time of the frozen layer's two GEMMs, timed here: the multiply-adds of the class
products and the additions of the transforms (docs/math.md, section 10) at the rate of a large GEMM,
and the bytes of x (read twice), dx and y (read, written), dy, z and w (written, read) at that of a
copy.

`predicted` is a step whose parts, each timed here alone, follow one another: the class products as
torch.bmm takes them, the additions at the rate at which `delta_weight` transforms, the bytes as in
the floor, and the calls, which a layer of 64 x 64 with one token has, too.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import show

from randlora_ext import Basis, RandLoraLinear, delta_weight

ELEMENT = {"float32": 4, "bfloat16": 2}


def seconds(step: Callable[[], object], repeats: int = 8) -> float:
    """The shortest time: what the machine can do."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return min(times)


def seconds_of_calls() -> float:
    """What a step of a layer so small that only calls count takes more than a frozen one."""
    frozen = torch.nn.Linear(64, 64).requires_grad_(False)
    ours = RandLoraLinear(torch.nn.Linear(64, 64), r=32, basis="hadamard")
    x, dy = torch.randn(1, 64, requires_grad=True), torch.ones(1, 64)
    steps = [lambda layer=layer: layer(x).backward(dy) for layer in (ours, frozen)]
    with_adapter, without = (seconds(step, 2000) for step in steps)
    return with_adapter - without


def seconds_of_an_addition() -> float:
    """In the transforms of dW of 2048 x 2048."""
    basis = Basis(2048, 2048, 32, kind="hadamard")
    lam, gam = torch.randn(basis.r, basis.n), torch.randn(basis.n, basis.d)
    return seconds(lambda: delta_weight(basis, lam, gam)) / (basis.d * additions(basis, 1, 1))


def additions(basis: Basis, transforms: int, mixes: int) -> float:
    N = 1 << (basis.K - 1).bit_length()
    return transforms * N * math.log2(N) + mixes * basis.K * math.log2(basis.r)


def seconds_of_products(row: dict) -> float:
    """Those of a step, of which expand has four and reduce three."""
    n = -(-min(row["in"], row["out"]) // row["rank"])
    dtype = getattr(torch, row["dtype"])
    x = torch.randn(row["rank"], row["tokens"], n).to(dtype)
    gam = torch.randn(row["rank"], n, n).to(dtype)
    return (4 if row["out"] >= row["in"] else 3) * seconds(lambda: torch.bmm(x, gam))


def seconds_of_frozen(row: dict) -> float:
    dtype = getattr(torch, row["dtype"])
    x, dy = (torch.randn(row["tokens"], row[side]).to(dtype) for side in ("in", "out"))
    weight = torch.randn(row["out"], row["in"]).to(dtype)
    return seconds(lambda: (x @ weight.T, dy @ weight))


def work(row: dict) -> tuple[float, float, float]:
    """Multiply-adds, additions and bytes of a step."""
    basis = Basis(row["in"], row["out"], row["rank"], kind="hadamard")
    products = (4 if basis.expand else 3) * basis.K * basis.n
    added = additions(basis, 2 if basis.expand else 3, 3)
    elements = 4 * row["in"] + 3 * row["out"] + 6 * basis.K
    moved = elements * ELEMENT[row["dtype"]]
    return row["tokens"] * products, row["tokens"] * added, row["tokens"] * moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "layer-xeon-spr.json"
    parser.add_argument("file", type=Path, nargs="?", default=default)
    rows = json.loads(parser.parse_args().file.read_text())["rows"]

    x, weight, other = torch.randn(4096, 2048), torch.randn(2048, 2048), torch.randn(32 << 20)
    into = torch.empty_like(other)
    multiply_adds_per_s = 4096 * 2048 * 2048 / seconds(lambda: x @ weight)
    bytes_per_s = 2 * other.nbytes / seconds(lambda: into.copy_(other))
    print(
        f"GEMM {multiply_adds_per_s / 1e9:.0f} G multiply-adds/s, copy {bytes_per_s / 1e9:.0f} GB/s"
    )
    calls, addition = seconds_of_calls(), seconds_of_an_addition()
    print(f"calls {calls * 1e6:.0f} us, {1e-9 / addition:.1f} G additions/s in transforms")
    for number, row in enumerate(row for row in rows if row["density"] == "hadamard"):
        products, added, moved = work(row)
        frozen = seconds_of_frozen(row)
        told = {
            name: row[name] for name in ("in", "out", "tokens", "rank", "dtype", "ours", "lora")
        }
        told["operations"] = (products + added) / multiply_adds_per_s / frozen
        told["bytes"] = moved / bytes_per_s / frozen
        parts = calls + seconds_of_products(row) + added * addition + moved / bytes_per_s
        told["predicted"] = 1 + parts / frozen
        show(told, header=number == 0)


if __name__ == "__main__":
    main()
