"""The tables of docs/cuda.md: estimates, the least time that the card's rates allow. Kernels of
Hadamard bases also take the time of their instructions, counted in tools/cuda/instructions.json.

python -m gpu.expected                             in benchmarks/; for an H100
python -m gpu.expected results/gpu-CARD.jsonl      by the rates that gpu_run.py measured on a
                                                   card, with what it measured of layers
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path

from randlora_ext import Basis

from . import floors, report
from .floors import Ceilings, Floor

# Measured on an H100 SXM by plain torch (a copy of 1 GiB, a product of 8192^3 in bf16), but for
# fp32, which is the data sheet's.
H100 = Ceilings(copy_bytes_per_s=3.0e12, bf16_flop_per_s=798e12, fp32_flop_per_s=67e12)
DENSITIES = {"density 1/64": 1 / 64, "density 0.07": 0.07, "density 1/3": 1 / 3}
RANK = 32
COUNTED = json.loads((Path(__file__).parents[2] / "tools/cuda/instructions.json").read_text())


def cell(floor: Floor, rates: Ceilings) -> str:
    bound = "bytes" if floor.byte_us(rates) > floor.operation_us(rates) else "operations"
    return f"{floor.us(rates):.0f} ({bound})"


def independent_lines(rates: Ceilings, size: int = 4096, tokens: int = 8192) -> list[list[str]]:
    bases, tall = (
        [Basis(n_in, size, RANK, density) for density in DENSITIES.values()]
        for n_in in (size, 14336)
    )
    forward, backward = zip(*(floors.independent(b, tokens) for b in bases), strict=True)
    rows = {
        f"basis of 14336 x {size} from a seed": [floors.whole_basis(b) for b in tall],
        "adapter forward": forward,
        "adapter backward": backward,
        "adapter forward, T = 16": [floors.independent(b, 16)[0] for b in bases],
    }
    frozen = 2 * Floor(0, matrix=2 * tokens * size**2).us(rates)
    both = zip(forward, backward, strict=True)
    over = [1 + (one.us(rates) + two.us(rates)) / frozen for one, two in both]
    made = [[what, *(cell(floor, rates) for floor in row)] for what, row in rows.items()]
    return [*made, ["step of a layer over frozen", *(f"{ratio:.2f}" for ratio in over)]]


LAYERS = [(8192, 4096, 4096), (2048, 4096, 4096), (840, 3072, 3072), (8192, 4096, 14336),
          (8192, 4096, 1024)]  # fmt: skip
HEAD = ["tokens, layer", "adapter forward, us", "backward, us", "step over frozen",
        f"LoRA, r = {RANK}, at best", "measured"]  # fmt: skip


def hadamard_lines(rates: Ceilings, rows: list[report.Row]) -> list[list[str]]:
    """For each layer the times of the adapter on Hadamard bases, kernel after kernel, and of a
    step over frozen."""
    measured = {
        (row["tokens"], row["size"]): f"{row['over_frozen']:.2f}"
        for row in report.latest("hadamard", rows)
        if row.get("bases") == "hadamard" and "over_frozen" in row
    }
    made = []
    for tokens, n_in, n_out in LAYERS:
        b = Basis(n_in, n_out, RANK, kind="hadamard")
        frozen = 2 * Floor(0, matrix=2 * tokens * b.D * b.d).us(rates)
        layer = f"{tokens}, {n_in} to {n_out}"
        kernels = floors.hadamard_kernels(b, tokens, counted=COUNTED["layers"][layer])
        us = [sum(kernel.us(rates) for kernel in part) for part in kernels]
        lora = [floor.us(rates) for floor in floors.lora(b, tokens, RANK)]
        over = [f"{1 + sum(each) / frozen:.2f}" for each in (us, lora)]
        seen = measured.get((tokens, f"{n_in}x{n_out}"), "")
        made.append([layer, *(f"{each:.0f}" for each in us), *over, seen])
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", help="gpu-CARD.jsonl of gpu_run.py")
    options = parser.parse_args(arguments)
    rows = report.read(options.results) if options.results else []
    cards = [row for row in rows if row["stage"] == "run" and "copy_bytes_per_s" in row]
    names = [each.name for each in fields(Ceilings)]
    rates = Ceilings(*(cards[-1][name] for name in names)) if cards else H100
    print(report.table(HEAD, hadamard_lines(rates, rows)))
    head = ["us at best, 4096 x 4096, T = 8192", *DENSITIES]
    print(report.table(head, independent_lines(rates)), end="")


if __name__ == "__main__":
    main()
