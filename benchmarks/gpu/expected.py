"""The table of docs/cuda.md: estimates, the least time that the card's rates and the kernels'
instructions (tools/cuda/instructions.json) allow.

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
RANK = 32
COUNTED = json.loads((Path(__file__).parents[2] / "tools/cuda/instructions.json").read_text())


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
    print(report.table(HEAD, hadamard_lines(rates, rows)), end="")


if __name__ == "__main__":
    main()
