"""What Hadamard bases must add to a frozen layer's step, beside what `layer.py` measured.

    python benchmarks/hadamard_floors.py                of results/layer-xeon-spr.json
    python benchmarks/hadamard_floors.py FILE.json      of `layer.py --hadamard --out FILE` just run

Two floors over the frozen layer's time: the multiply-adds of the class products and the additions
of the transforms (docs/math.md, section 10) at the rate of a large GEMM of this machine, and the
bytes of x (read twice), dx and y (read, written), dy, z and w (written, read) at that of a copy.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import show

from randlora_ext import TernaryBasis

ELEMENT = {"float32": 4, "bfloat16": 2}


def seconds(step: Callable[[], object], repeats: int = 8) -> float:
    """The shortest time: what the machine can do."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return min(times)


def work(row: dict) -> tuple[float, float]:
    """Operations (a multiply-add or an addition is one) and bytes of a step."""
    basis = TernaryBasis(row["in"], row["out"], row["rank"], kind="hadamard")
    N = 1 << (basis.K - 1).bit_length()
    transforms = 2 if basis.expand else 3
    products = 4 * basis.K * basis.n
    additions = transforms * N * math.log2(N) + 3 * basis.K * math.log2(basis.r)
    elements = 4 * row["in"] + 3 * row["out"] + 6 * basis.K
    moved = elements * ELEMENT[row["dtype"]]
    return row["tokens"] * (products + additions), row["tokens"] * moved


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
    for number, row in enumerate(row for row in rows if row["density"] == "hadamard"):
        operations, moved = work(row)
        told = {
            name: row[name] for name in ("in", "out", "tokens", "rank", "dtype", "ours", "lora")
        }
        told["operations"] = operations / multiply_adds_per_s / row["frozen_ms"] * 1e3
        told["bytes"] = moved / bytes_per_s / row["frozen_ms"] * 1e3
        show(told, header=number == 0)


if __name__ == "__main__":
    main()
