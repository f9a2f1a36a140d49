"""``randlora bench``: what training one layer costs on this machine, in a minute."""

import statistics
import time
import warnings
from fractions import Fraction

import peft
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from .. import RandLoraLinear, TernaryBasis
from ..diagnostics import LIMITS, describe, relative_error
from ..peft import disable

_R = 32
# The most telling rows first: those that do not fit into the minute are left out.
_ROWS = [
    ((1024, 1024), 256, "very_sparse"),
    ((1024, 1024), 256, "0.07"),
    ((1024, 1024), 256, "1/3"),
    ((1024, 1024), 16, "0.07"),
    ((2048, 2048), 256, "0.07"),
    ((2048, 2048), 1024, "0.07"),
    ((4096, 4096), 256, "0.07"),
]


def bench(seconds: float = 60, rows: list | None = None) -> int:
    """Prints the time of a step divided by the frozen layer's, one method per column.

    Raises RuntimeError if our operator disagrees with the float64 reference.
    """
    disable()  # "PEFT" means stock PEFT
    rows = _ROWS if rows is None else rows
    print("\n".join(describe()))
    print("forward and backward over the frozen layer (1.0 = free), fp32, r = 32, medians of 5")
    columns = f"{'layer':>12} {'tokens':>7} {'density':>12} {'frozen':>10}"
    print(f"{columns} {'LoRA':>6} {'PEFT':>6} {'ours':>5}")
    began = time.monotonic()
    for done, (size, tokens, density) in enumerate(rows):
        if time.monotonic() - began > seconds:
            print(f"the minute is over: {len(rows) - done} larger layers were left out")
            break
        frozen, *ratios = _compare(size, tokens, density)
        print(
            f"{f'{size[0]} x {size[1]}':>12} {tokens:>7} {density:>12} {frozen * 1e3:>7.2f} ms "
            "{:>6.2f} {:>6.2f} {:>5.2f}".format(*ratios),
            flush=True,
        )
    print("every row was verified against the float64 reference; PEFT has no density 0.07: sparse")
    return 0


def _compare(size: tuple[int, int], tokens: int, label: str) -> list[float]:
    """Seconds of the frozen layer; times of LoRA, PEFT's RandLoRA and ours divided by that."""
    density = min(size) ** -0.5 if label == "very_sparse" else float(Fraction(label))
    error = relative_error(TernaryBasis(*size, _R, density), tokens)
    if not error <= LIMITS[torch.float32]:
        raise RuntimeError(f"verification failed: relative error {error:.1e} at {size}, {label}")
    base = nn.Linear(*size).requires_grad_(False)
    kind = {"very_sparse": True} if label == "very_sparse" else {"sparse": True}
    targets = {"target_modules": ["0"], "r": _R}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save")
        stock = peft.RandLoraConfig(save_projection=False, **kind, **targets)
        lora, randlora = _adapted(base, peft.LoraConfig(**targets)), _adapted(base, stock)
    layers = [base, lora, randlora, RandLoraLinear(base, r=_R, density=density)]
    x = torch.randn(tokens, size[0], requires_grad=True)
    dy = torch.randn(tokens, size[1])
    timers = [Timer("step()", globals={"step": _step(layer, x, dy)}) for layer in layers]
    calls = min(60, max(1, int(1e9 / (x.numel() * size[1]))))
    # In turn, so that a change of the machine's speed affects all of them.
    rounds = [[timer.timeit(calls).mean for timer in timers] for _ in range(5)]
    frozen, *others = (statistics.median(times) for times in zip(*rounds, strict=True))
    return [frozen, *(seconds / frozen for seconds in others)]


def _adapted(base: nn.Linear, config: peft.PeftConfig) -> nn.Module:
    return peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]


def _step(layer: nn.Module, x: Tensor, dy: Tensor):
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer(x).backward(dy)

    return step
