"""What `randlora_ext.calibrate` costs, beside training steps of the same model.

    OMP_NUM_THREADS=1 python benchmarks/calibrate.py        about six minutes

A SmolLM2-135M-shaped model with random weights, whose MLP or all linear layers have adapters on
Hadamard bases, in a process of its own. Seconds of a step (the median) with a batch of each size,
those of calibrating on four batches of the same size, their quotient, and both peaks of memory,
with the model and all libraries.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from memory import MIB, free_unused, status
from model_step import LINEAR, SHAPES, adapted
from record import in_a_process, show, write

import randlora_ext

TARGETS = {"all": LINEAR, "mlp": LINEAR[4:]}


def measured(shape: str, targets: str, tokens: int, repeats: int) -> dict[str, float]:
    model = adapted("ours hadamard", shape, TARGETS[targets])
    batches = [
        {name: ids for name in ("input_ids", "labels")}
        for ids in torch.randint(0, SHAPES[shape]["vocab_size"], (4, 1, tokens))
    ]
    start = time.perf_counter()
    randlora_ext.calibrate(model, batches)
    seconds = time.perf_counter() - start
    peak = status("VmHWM") / MIB
    free_unused()
    # The kernel's record of the peak begins anew.
    Path("/proc/self/clear_refs").write_text("5")
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(**batches[0]).loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    step = statistics.median(times[1:])
    return {
        "step_s": step,
        "calibrate_s": seconds,
        "in_steps": seconds / step,
        "step_mib": status("VmHWM") / MIB,
        "calibrate_mib": peak,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--tokens", default="230,1000", help="of a batch, each one row")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write FILE.json")
    args = parser.parse_args(arguments)
    rows = []
    for targets in TARGETS:
        for tokens in map(int, args.tokens.split(",")):
            costs = in_a_process(measured, args.shape, targets, tokens, args.repeats)
            rows.append({"layers": targets, "tokens": tokens, **costs})
            show(rows[-1], header=len(rows) == 1)
    if args.out:
        write(args.out, rows, shape=args.shape)


if __name__ == "__main__":
    main()
