"""One layer, forward and backward: frozen, LoRA, PEFT's RandLoRA and ours, in one process.

    python benchmarks/layer.py                       the table of README (about five minutes)
    python benchmarks/layer.py --quick               a smaller grid
    python benchmarks/layer.py --paths               our three paths side by side

Every method is first verified against the fp64 reference, then timed in turn; figures are medians,
ratios over the frozen layer's median of the same row (`randlora_ext/cli/measure.py`, which
`python -m randlora_ext --bench` uses too).
"""

import argparse
import csv
import json
from pathlib import Path

import torch

from randlora_ext.cli.measure import compare, machine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1024x1024,2048x2048", help="in x out, comma separated")
    parser.add_argument("--tokens", default="16,256,1024")
    parser.add_argument("--densities", default="1/3,0.07,very_sparse")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one size, two token counts")
    parser.add_argument("--paths", action="store_true", help="our paths instead of other methods")
    parser.add_argument("--out", type=Path, help="write FILE.csv and FILE.json")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.tokens, args.repeats = "1024x1024", "16,256", 5
    paths = ()
    if args.paths:
        paths = ("factored", "delta", "merged")[: 3 if args.dtype == "fp32" else 2]

    print(json.dumps(machine()))
    sizes = [tuple(int(n) for n in s.split("x")) for s in args.sizes.split(",")]
    options = {"dtype": DTYPES[args.dtype], "rank": args.rank, "repeats": args.repeats}
    rows = []
    for size in sizes:
        for tokens in (int(t) for t in args.tokens.split(",")):
            for density in args.densities.split(","):
                row = compare(size, tokens, density, paths=paths, **options)
                if not rows:
                    print("  ".join(f"{k:>11}" for k in row))
                rows.append(row)
                print("  ".join(f"{v:>11.3g}" if isinstance(v, float) else f"{v!s:>11}"
                                for v in row.values()), flush=True)  # fmt: skip
    if args.paths:
        worst = max(r["regret"] for r in rows)
        near = sum(r["regret"] <= 0.1 for r in rows)
        print(f"the choice is within 10% of the best path in {near} of {len(rows)} rows; "
              f"at worst it loses {worst:.0%}")  # fmt: skip
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(
            json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n"
        )
        with args.out.with_suffix(".csv").open("w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
