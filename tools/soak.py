"""Trains for many steps and tells whether memory grows.

    python tools/soak.py 10000        # exit code 1 if it grows

Every step has another number of tokens; layers of other shapes come and go, are merged, unmerged,
disabled, saved and loaded. Counted after a warm-up, and again at the end: bytes that malloc
has handed out (glibc's mallinfo2), resident memory, live tensors and Python objects, packed bases.
"""

import ctypes
import gc
import resource
import sys
from io import BytesIO

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
    _fields_ = [("values", ctypes.c_size_t * 10)]


def allocated() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    values = mallinfo2().values
    return values[4] + values[7]  # hblkhd, uordblks


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


def visit(number: int) -> None:
    """A layer that lives for one step."""
    n_in, n_out, r, density = SHAPES[number // 5 % len(SHAPES)]
    bases = {"density": density, "basis": "independent"} if number % 2 else {"basis": "hadamard"}
    layer = RandLoraLinear(nn.Linear(n_in, n_out), r, seed=number % 7, **bases)
    with torch.autocast("cpu", torch.bfloat16, enabled=number % 2 == 0):
        layer(torch.randn(9, n_in, requires_grad=True)).float().sum().backward()
    layer.merge()
    layer.eval()(torch.randn(2, n_in))
    layer.unmerge()
    layer.disabled = True
    torch.save(layer.state_dict(), stream := BytesIO())
    stream.seek(0)
    layer.load_state_dict(torch.load(stream))


def fail(model: nn.Module) -> None:
    """Errors must not keep anything either."""
    for x in (torch.randn(3, 47), torch.zeros(3, 48, dtype=torch.int64)):
        try:
            model(x)
        except (ValueError, RuntimeError):
            continue
        raise AssertionError("no error")


def soak(steps: int) -> dict[str, int]:
    """What has grown since the warm-up: a small model, beside layers that go."""
    first = RandLoraLinear(nn.Linear(48, 64), 6, density=0.07)
    last = RandLoraLinear(nn.Linear(64, 32), 6, basis="hadamard")
    model = nn.Sequential(first, nn.ReLU(), last)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            before = counts()
        model(torch.randn(TOKENS[number % len(TOKENS)], 48)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 5 == 0:
            visit(number)
        if number % 10 == 0:
            fail(model)
    return {name: count - before[name] for name, count in counts().items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    growth = soak(int((sys.argv[1:] or [10_000])[0]))
    for name, limit in LIMITS.items():
        print(f"{name:10} {growth[name]:+12,} of at most {limit:,}")
    sys.exit(any(growth[name] > limit for name, limit in LIMITS.items()))
