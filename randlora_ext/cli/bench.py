"""``--bench``: what an adapter costs on this machine, in a minute."""

import time

from ..peft import disable
from .measure import compare, machine

_SECONDS = 60
# The most telling first: what does not fit into the minute is left out, and said.
_ROWS = [
    ((1024, 1024), 256, "very_sparse"),
    ((1024, 1024), 256, "0.07"),
    ((1024, 1024), 256, "1/3"),
    ((1024, 1024), 16, "0.07"),
    ((2048, 2048), 256, "0.07"),
    ((2048, 2048), 1024, "0.07"),
    ((4096, 4096), 256, "0.07"),
]


def bench(seconds: float = _SECONDS, rows: list | None = None) -> int:
    """Prints forward and backward of one layer, over the frozen layer, one method a column."""
    disable()  # "PEFT" means stock PEFT
    rows = _ROWS if rows is None else rows
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print("forward and backward over the frozen layer (1.0 = free), fp32, r = 32, medians of 5")
    print(
        f"{'layer':>12} {'tokens':>7} {'density':>12} {'frozen':>10} {'LoRA':>6} {'PEFT':>6} ours"
    )
    began = time.monotonic()
    for done, (size, tokens, density) in enumerate(rows):
        if time.monotonic() - began > seconds:
            print(f"the minute is over: {len(rows) - done} larger layers were left out")
            break
        row = compare(size, tokens, density, repeats=5)
        print(
            f"{f'{size[0]} x {size[1]}':>12} {tokens:>7} {density:>12} {row['frozen_ms']:>7.2f} ms "
            f"{row['lora']:>6.2f} {row['peft']:>6.2f} {row['ours']:>4.2f}",
            flush=True,
        )
    print("every row was verified against the float64 reference; PEFT has no density 0.07: sparse")
    return 0
