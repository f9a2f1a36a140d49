"""Trains for many steps and tells whether memory grows.

    python tools/soak.py 10000        # exit code 1 if it grows

Every step has another number of tokens; layers of other shapes come and go, adapters are added,
merged, disabled, saved and loaded. Counted after a warm-up, and again at the end: bytes that malloc
has handed out (glibc's mallinfo2), resident memory, live tensors and Python objects, packed bases.
"""

import argparse
import ctypes
import gc
import io
import resource

import torch
from torch import nn

from randlora_ext import RandLoraLinear
from randlora_ext.basis import cache

WARM_UP = 100
TOKENS = (1, 7, 16, 33, 64, 130)
SHAPES = ((40, 24, 5, 0.07), (24, 40, 7, 1 / 3), (33, 33, 4, 0.3), (64, 20, 8, 0.1))
# A leak of one small tensor in a hundred steps would show; what remains is Python's own pools.
LIMITS = {"malloc": 200_000, "resident": 16 << 20, "tensors": 0, "packed": 0, "objects": 500}


class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost",
    )]  # fmt: skip


def allocated() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def counts() -> dict[str, int]:
    gc.collect()
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * resource.getpagesize()
    objects = gc.get_objects()
    return {
        "malloc": allocated(),
        "resident": resident,
        "tensors": sum(isinstance(o, torch.Tensor) for o in objects),
        "objects": len(objects),
        "packed": len(cache._cache),
    }


class Trainer:
    """A small model of two adapted layers that always lives, and others that come and go."""

    def __init__(self) -> None:
        self.model = nn.Sequential(
            RandLoraLinear(nn.Linear(48, 64), r=6, density=0.07, basis="independent"),
            nn.ReLU(),
            RandLoraLinear(nn.Linear(64, 32), r=6, basis="hadamard"),
        )
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=1e-3
        )

    def step(self, number: int) -> None:
        x = torch.randn(TOKENS[number % len(TOKENS)], 48)
        loss = self.model(x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if number % 5 == 0:
            self.visit(number)
        if number % 10 == 0:
            self.fail(number)

    def visit(self, number: int) -> None:
        """A layer that lives for one step."""
        n_in, n_out, r, density = SHAPES[number // 5 % len(SHAPES)]
        layer = RandLoraLinear(nn.Linear(n_in, n_out), r, density=density, basis="independent")
        kind = {"density": 0.2, "basis": "independent"} if number % 2 else {"basis": "hadamard"}
        layer.update_layer("two", 3, seed=number % 7, **kind)
        layer.set_adapter(["default", "two"])
        with torch.autocast("cpu", torch.bfloat16, enabled=number % 2 == 0):
            layer(torch.randn(9, n_in, requires_grad=True)).float().sum().backward()
        layer.merge(keep_weight=("host", "device", "nothing")[number % 3])
        layer(torch.randn(2, n_in))
        layer.disable()
        stream = io.BytesIO()
        torch.save(layer.state_dict(), stream)
        stream.seek(0)
        layer.load_state_dict(torch.load(stream))

    def fail(self, number: int) -> None:
        """Errors must not keep anything either."""
        for x in (torch.randn(3, 47), torch.zeros(3, 48, dtype=torch.int64)):
            try:
                self.model(x)
            except (ValueError, RuntimeError):
                continue
            raise AssertionError("no error")


def soak(steps: int) -> tuple[dict[str, int], dict[str, int]]:
    """(counts after the warm-up, counts at the end)."""
    trainer = Trainer()
    for number in range(WARM_UP):
        trainer.step(number)
    before = counts()
    for number in range(steps):
        trainer.step(number)
    return before, counts()


def grown(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return [name for name, limit in LIMITS.items() if after[name] - before[name] > limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("steps", type=int, nargs="?", default=10_000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before, after = soak(steps)
    for name in before:
        print(f"{name:10} {before[name]:12,} {after[name]:12,} {after[name] - before[name]:+10,}")
    growing = grown(before, after)
    print(f"{steps} steps: " + (f"GROWS: {', '.join(growing)}" if growing else "no growth"))
    raise SystemExit(1 if growing else 0)


if __name__ == "__main__":
    main()
