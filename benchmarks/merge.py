"""Time and memory of merging and unmerging, and what becomes of W, beside stock PEFT.

    python benchmarks/merge.py --out benchmarks/results/merge-epyc-zen4

Each row is a process: a model of equal linear layers, and cycles of merge_adapter, an optimizer's
step on lambda and gamma (or on LoRA's factors), and unmerge_adapter. Times are medians over the
cycles in ms a layer, memory is in MiB a layer above the unmerged model, `drift` is the change of W
after all cycles over the norm of dW. "lora" and "peft" are stock PEFT. Bases are PEFT's `sparse`
ones, or those named behind "host".
"""

import argparse
import ctypes
import gc
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import memory
import peft
import record
import torch
from torch import nn

import randlora_ext.peft

WAYS = ("lora", "peft", "host", "device", "nothing", "host 0.07", "host hadamard")


def adapted(way: str, size: int, layers: int, rank: int) -> peft.PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers))).bfloat16()
    targets = [str(i) for i in range(layers)]
    if way == "lora":
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    else:
        keep_weight, _, bases = way.partition(" ")
        if way != "peft":
            randlora_ext.peft.enable(keep_weight=keep_weight)
        options: dict[str, dict] = {
            "": {"sparse": True},
            "0.07": {"density": 0.07},
            "hadamard": {"basis": "hadamard"},
        }
        make = randlora_ext.peft.RandLoraConfig if bases else peft.RandLoraConfig
        scaled = {"r": rank, "randlora_alpha": 20 * rank}
        config = make(**scaled, target_modules=targets, **options[bases])
    model = peft.get_peft_model(base, config)
    learn(model, 1e-3)
    return model


@torch.no_grad()
def learn(model: peft.PeftModel, rate: float) -> None:
    """A step like Adam's: every trained number moves by about `rate`."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(rate * torch.randn_like(parameter).sign())


def measured(way: str, size: int, layers: int, rank: int, cycles: int) -> dict:
    warnings.simplefilter("ignore")
    model = adapted(way, size, layers, rank)
    tuned = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    before = [layer.get_base_layer().weight.detach().clone() for layer in tuned]
    norms = [float(layer.get_delta_weight("default").norm()) for layer in tuned]
    model.merge_adapter()  # makes packed bases and buffers that stay
    model.unmerge_adapter()
    times: dict[str, list[float]] = {"merge": [], "unmerge": []}
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start = memory.status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    kept = 0
    for cycle in range(cycles):
        for name in times:
            began = time.perf_counter()
            getattr(model, f"{name}_adapter")()
            times[name].append(time.perf_counter() - began)
            if name == "merge":
                learn(model, 1e-5)
                if cycle == 0:
                    ctypes.CDLL(None).malloc_trim(0)
                    kept = memory.status("VmRSS") - start
    drift = [
        float((layer.get_base_layer().weight - W).float().norm()) / norm
        for layer, W, norm in zip(tuned, before, norms, strict=True)
    ]
    return {
        "way": way,
        **{name: statistics.median(each) * 1e3 / layers for name, each in times.items()},
        "kept_mib": kept / memory.MIB / layers,
        "peak_mib": (memory.status("VmHWM") - start) / memory.MIB / layers,
        "drift": statistics.mean(drift),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write OUT.json")
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    rows: list[dict] = []
    for way in WAYS:
        rows.append(record.in_a_process(measured, way, **options))
        record.show(rows[-1], header=len(rows) == 1)
    if out:
        record.write(out, rows, **options)


if __name__ == "__main__":
    main()
