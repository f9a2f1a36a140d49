"""The tables of docs/cuda.md: estimates, the least time that the card's rates and what the kernels
do (tools/cuda/instructions.json) allow.

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
from .floors import LAUNCH_US, Ceilings, Floor

# Measured on an H100 SXM by plain torch (a copy of 1 GiB, a product of 8192^3 in bf16), but for
# fp32: 132 multiprocessors of 128 multiply-adds at 1.7 GHz.
H100 = Ceilings(copy_bytes_per_s=3.0e12, bf16_flop_per_s=798e12, fp32_flop_per_s=132 * 256 * 1.7e9)
RANK = 32
COUNTED = json.loads((Path(__file__).parents[2] / "tools/cuda/instructions.json").read_text())

LAYERS = [(8192, 4096, 4096), (2048, 4096, 4096), (840, 3072, 3072), (8192, 4096, 14336),
          (8192, 4096, 1024)]  # fmt: skip
HEAD = ["tokens, layer", "adapter forward, us", "backward, us", "step over frozen",
        f"LoRA, r = {RANK}, at best", "measured"]  # fmt: skip
MODELS = {
    "3B, q and v": [(3072, 3072), (3072, 1024)],
    "8B, all seven": [*2 * [(4096, 4096)], *2 * [(4096, 1024)], *2 * [(4096, 14336)],
                      (14336, 4096)],
}  # fmt: skip
TOKENS = [840, 4096, 8192]
MODELS_HEAD = ["layers, tokens", "frozen, us", "ours", "LoRA, bf16", "PEFT's default LoRA, fp32",
               "LoRA at best"]  # fmt: skip


def us_of(kernels: list[Floor], rates: Ceilings) -> float:
    """One after the other."""
    return sum(kernel.us(rates) + LAUNCH_US for kernel in kernels)


def frozen_us(tokens: int, n_in: int, n_out: int, rates: Ceilings) -> float:
    """y and dx."""
    return us_of(2 * [Floor(0, matrix=2 * tokens * n_in * n_out)], rates)


def ours(tokens: int, n_in: int, n_out: int) -> tuple[list[Floor], list[Floor]]:
    counted = COUNTED["layers"][f"{tokens}, {n_in} to {n_out}"]
    basis = Basis(n_in, n_out, RANK, kind="hadamard")
    return floors.hadamard_kernels(basis, tokens, counted=counted)


def layer_lines(rates: Ceilings, rows: list[report.Row]) -> list[list[str]]:
    """For each layer the times of the adapter on Hadamard bases, and of a step over frozen."""
    measured = {
        (row["tokens"], row["size"]): f"{row['over_frozen']:.2f}"
        for row in report.latest("hadamard", rows)
        if row.get("bases") == "hadamard" and "over_frozen" in row
    }
    made = []
    for tokens, n_in, n_out in LAYERS:
        frozen = frozen_us(tokens, n_in, n_out, rates)
        us = [us_of(part, rates) for part in ours(tokens, n_in, n_out)]
        lora = [us_of(part, rates) for part in floors.best_lora(n_in, n_out, tokens, RANK)]
        over = [f"{1 + sum(each) / frozen:.2f}" for each in (us, lora)]
        seen = measured.get((tokens, f"{n_in}x{n_out}"), "")
        layer = f"{tokens}, {n_in} to {n_out}"
        made.append([layer, *(f"{each:.0f}" for each in us), *over, seen])
    return made


def model_lines(rates: Ceilings) -> list[list[str]]:
    """For one layer of each model the time of a step's adapters, and the step over frozen."""
    made = []
    for model, sizes in MODELS.items():
        for tokens in TOKENS:
            frozen = sum(frozen_us(tokens, *size, rates) for size in sizes)
            steps = [
                [ours(tokens, *size) for size in sizes],
                [floors.peft_lora(*size, tokens, RANK, element=2) for size in sizes],
                [floors.peft_lora(*size, tokens, RANK, element=4) for size in sizes],
                [floors.best_lora(*size, tokens, RANK) for size in sizes],
            ]
            us = [sum(us_of(part, rates) for step in each for part in step) for each in steps]
            cells = (f"{each:.0f}, {1 + each / frozen:.2f}" for each in us)
            made.append([f"{model}, {tokens}", f"{frozen:.0f}", *cells])
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", help="gpu-CARD.jsonl of gpu_run.py")
    options = parser.parse_args(arguments)
    rows = report.read(options.results) if options.results else []
    cards = [row for row in rows if row["stage"] == "run" and "copy_bytes_per_s" in row]
    names = [each.name for each in fields(Ceilings)]
    rates = Ceilings(*(cards[-1][name] for name in names)) if cards else H100
    print(report.table(HEAD, layer_lines(rates, rows)))
    print(report.table(MODELS_HEAD, model_lines(rates)), end="")


if __name__ == "__main__":
    main()
