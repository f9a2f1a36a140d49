"""One layer, forward and backward: frozen, LoRA, PEFT's RandLoRA and ours; DoRA, VeRA, full tuning.

    python benchmarks/layer.py                       the table of README (about five minutes)
    python benchmarks/layer.py --quick               a smaller grid
    python benchmarks/layer.py --methods all         every method, and ours by each path
    python benchmarks/layer.py --memory              with the peak of memory of each method
    python benchmarks/layer.py --densities hadamard,dense     on our bases and PEFT's default
    python benchmarks/layer.py --paths               our paths alone, and what the choice loses
    python benchmarks/layer.py --append --out FILE   adds rows to those that FILE.json has

A row is a process. In it every RandLoRA is first verified against the fp64 reference, outputs and
gradients, then all methods are timed in turn, so that their ratios see one machine state; figures
are medians, ratios over the frozen layer's median of the same row (`compare.py`).
Peak memory takes one process per method: in a shared one, each would see the highest of all.
Columns named METHOD_mib are MiB over the frozen layer's.
"""

import argparse
import json
from pathlib import Path

import torch
from compare import compare
from memory import peak_mib
from methods import METHODS
from record import in_a_process, machine, show, write

from randlora_ext.ops.path import PATHS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure(size: tuple[int, int], tokens: int, density: str, methods: list[str], args) -> dict:
    """One row; each process that it takes ends with it."""
    dtype = DTYPES[args.dtype]
    row = in_a_process(
        compare, size, tokens, density,
        dtype=dtype, rank=args.rank, repeats=args.repeats, methods=methods,
    )  # fmt: skip
    if args.memory:
        peaks = {
            method: in_a_process(peak_mib, method, size, tokens, density, dtype, args.rank)
            for method in ("frozen", *methods)
        }
        row["frozen_mib"] = peaks["frozen"]
        row |= {f"{method}_mib": peaks[method] - peaks["frozen"] for method in methods}
    return row


def chosen(args, density: str) -> list[str]:
    no_delta = [path for path in PATHS if path != "delta" or density != "hadamard"]
    if args.paths:
        return [path for path in no_delta if path != "merged" or args.dtype == "fp32"]
    if args.methods == "all":
        return [method for method in METHODS if method not in PATHS or method in no_delta]
    return args.methods.split(",")


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
    parser.add_argument("--paths", action="store_true", help="our paths instead of other methods")
    parser.add_argument("--out", type=Path, help="write FILE.json")
    parser.add_argument("--append", action="store_true", help="keep the rows that FILE.json has")
    args = parser.parse_args(arguments)
    if args.quick:
        args.sizes, args.tokens, args.repeats = "1024x1024", "16,256", 5

    print(json.dumps(machine()))
    sizes = [tuple(int(n) for n in s.split("x")) for s in args.sizes.split(",")]
    before = args.out.with_suffix(".json") if args.out and args.append else None
    rows = json.loads(before.read_text())["rows"] if before and before.exists() else []
    header = True
    for size in sizes:
        for tokens in (int(t) for t in args.tokens.split(",")):
            for density in args.densities.split(","):
                row = measure(size, tokens, density, chosen(args, density), args)
                show(row, header)
                header = False
                rows.append(row)
                if args.out:  # now, so that a stopped run keeps its rows
                    write(args.out, rows)
    if args.paths:
        worst = max(r["regret"] for r in rows)
        near = sum(r["regret"] <= 0.1 for r in rows)
        print(f"the choice is within 10% of the best path in {near} of {len(rows)} rows; "
              f"at worst it loses {worst:.0%}")  # fmt: skip


if __name__ == "__main__":
    main()
