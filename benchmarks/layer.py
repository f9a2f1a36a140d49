"""One layer, forward and backward: frozen, LoRA, PEFT's RandLoRA and ours; DoRA, VeRA, full tuning.

    python benchmarks/layer.py                       the table of docs/benchmarks.md (five minutes)
    python benchmarks/layer.py --quick               a smaller grid
    python benchmarks/layer.py --methods all         every method
    python benchmarks/layer.py --memory              with the peak of memory of each method
    python benchmarks/layer.py --densities hadamard,dense     on our bases and PEFT's default
    python benchmarks/layer.py --hadamard            LoRA and Hadamard bases
    python benchmarks/layer.py --append --out FILE   adds rows to those that FILE.json has

A row is a process. In it every RandLoRA is first verified against the fp64 reference, outputs and
gradients, then all methods are timed in turn, so that their ratios see one machine state; figures
are medians, ratios over the frozen layer's median of the same row (`compare.py`).
Peak memory takes one process per method: in a shared one, each would see the highest of all.
Columns named METHOD_mib are MiB over the frozen layer's.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import torch
from compare import compare
from memory import peak_mib
from methods import METHODS
from record import in_a_process, machine, show, write

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Case = tuple[tuple[int, int], int, str, str, int]  # (in, out), tokens, density, dtype, r


def measure(case: Case, methods: list[str], repeats: int, memory: bool) -> dict:
    """One row; each process that it takes ends with it."""
    *shape, dtype_name, rank = case
    dtype = DTYPES[dtype_name]
    row = in_a_process(
        compare, *shape, dtype=dtype, rank=rank, repeats=repeats, methods=methods
    )  # fmt: skip
    if memory:
        peaks = {
            method: in_a_process(peak_mib, method, *shape, dtype, rank)
            for method in ("frozen", *methods)
        }
        row["frozen_mib"] = peaks["frozen"]
        row |= {f"{method}_mib": peaks[method] - peaks["frozen"] for method in methods}
    return row


def cases(args) -> list[Case]:
    sizes = [tuple(int(n) for n in s.split("x")) for s in args.sizes.split(",")]
    tokens = [int(count) for count in args.tokens.split(",")]
    found = list(product(sizes, tokens, args.densities.split(","), [args.dtype], [args.rank]))
    if args.hadamard and not args.quick:
        square = 2048, 2048
        found += [(square, 512, "hadamard", "bf16", 32), (square, 1024, "hadamard", "fp32", 64)]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1024x1024,2048x2048", help="in x out, comma separated")
    parser.add_argument("--tokens", default="16,256,1024")
    parser.add_argument("--densities", default="hadamard,1/3,0.07,very_sparse")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--methods", default="lora,peft,ours", help=f"all, or of {METHODS}")
    parser.add_argument("--memory", action="store_true", help="a process a method for its peak")
    parser.add_argument("--quick", action="store_true", help="one size, two token counts")
    told = "LoRA of the same r and Hadamard bases, the rows of docs/benchmarks.md"
    parser.add_argument("--hadamard", action="store_true", help=told)
    parser.add_argument("--out", type=Path, help="write FILE.json")
    parser.add_argument("--append", action="store_true", help="keep the rows that FILE.json has")
    args = parser.parse_args(arguments)
    if args.hadamard:
        args.sizes = "1024x1024,2048x2048,4096x4096,1024x4096,4096x1024"
        args.tokens, args.densities, args.methods = "16,256,1024,4096", "hadamard", "lora,ours"
    if args.quick:
        args.sizes, args.tokens, args.repeats = "1024x1024", "16,256", 5

    print(json.dumps(machine()))
    before = args.out.with_suffix(".json") if args.out and args.append else None
    rows = json.loads(before.read_text())["rows"] if before and before.exists() else []
    methods = [*METHODS] if args.methods == "all" else args.methods.split(",")
    for i, case in enumerate(cases(args)):
        row = measure(case, methods, args.repeats, args.memory)
        show(row, header=i == 0)
        rows.append(row)
        if args.out:  # now, so that a stopped run keeps its rows
            write(args.out, rows)


if __name__ == "__main__":
    main()
