"""Can Hadamard bases train at LoRA's price on this card? In plain torch; no extension is needed.

    forward     z = class products of x    y += transform(lambda * mix(z))
    backward    u = transform(dy)          w = mix(lambda * u)    dx += class products of w
                dgamma = class products of w and x                dlambda from u and mix(z)

(if the layer has fewer outputs than inputs, forward and the gradient of x change places).

The class products are batches of r products (T, n) x (n, n), the transform is two small matrix
products. What fused kernels save is the traffic between these steps. Every method is checked
against float64 first; then all are timed in turn, captured in CUDA graphs, the L2 flushed before
each call.
"""

import argparse
import functools
from collections.abc import Callable

import torch

from . import rows
from .card import Card
from .hadamard_methods import Hadamard, Problem, methods, peft

SIZES = [(4096, 4096), (3072, 3072), (4096, 14336), (4096, 1024)]  # in, out
TOKENS = [8192, 840, 2048]  # the most telling first
RANK = 32
TOY = {"sizes": [(64, 64), (64, 160), (160, 64)], "tokens": [16, 3], "rank": 8}
LIMIT = {torch.float64: 1e-12, torch.bfloat16: 3e-2}  # of relative errors, in the 2-norm


def check(p: Problem) -> None:
    """A row for each method; in float64 one that is wrong ends the program."""
    for name, method in methods(p).items():
        about = {"method": name, "dtype": str(p.dtype), "size": p.size}
        error = method.error()
        rows.row(**about, error=error)
        if not error < LIMIT[p.dtype]:  # true for NaN, too
            wrong = ValueError(f"relative error {error:.1e}")
            rows.failed(str(about), wrong)
            if p.dtype is torch.float64:
                raise wrong


def pieces(p: Problem) -> dict[str, Callable[[], object]]:
    """What the step on Hadamard bases consists of; x and y as in `Hadamard`."""
    h = Hadamard(p)
    blocks, weights, x, y = h.blocks(), h.weights(), h.x.clone(), h.y.clone()
    z, u = h.inner(blocks), h.down()
    w = h.mix(u * weights)
    return {
        "gamma with its signs": h.blocks,
        "z": lambda: h.inner(blocks),
        "y += transform": lambda: h.add_up(y, z, weights),
        "u": h.down,
        "w": lambda: h.mix(u * weights),
        "x += class products": lambda: h.add_outer(x, w, blocks),
        "dgamma, dlambda": lambda: h.gradients(u, z, w),
    }


def measure(card: Card, p: Problem) -> None:
    """A row for each method and piece."""
    nothing = functools.partial(torch.add, p.x[0], 1)  # how much of a time is the graph's launch
    every: dict[str, Callable[[], object]] = {"one small kernel": nothing}
    every |= {name: method.step for name, method in methods(p).items()} | pieces(p)
    about = {"size": f"{p.size[0]}x{p.size[1]}", "tokens": p.tokens}
    calls = {}
    for name, call in every.items():
        try:
            calls[name] = card.captured(call)
        except Exception as error:  # the others are still worth their time
            rows.failed(f"{name} {about}", error)
    times = card.medians(calls)
    for name, ms in times.items():
        over = ms / times["frozen"]
        rows.row(method=name, **about, us=ms * 1e3, over_frozen=over)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    dry = parser.parse_args(arguments).dry
    if not dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA card; --dry runs toy sizes on the CPU")
    card = Card(dry)
    torch.manual_seed(0)
    if peft is None:
        rows.skipped("PEFT's LoRA", "peft is not installed")
    for size in TOY["sizes"]:
        check(Problem(size, 11, TOY["rank"], torch.float64, card.device))
    run = TOY if dry else {"sizes": SIZES, "tokens": TOKENS, "rank": RANK}
    for size in run["sizes"]:
        check(Problem(size, 64, run["rank"], torch.bfloat16, card.device))
    card.free()
    for tokens in run["tokens"]:
        for size in run["sizes"]:
            if rows.seconds_left() < 15:
                rows.skipped(f"{size} T={tokens}")
                continue
            try:
                measure(card, Problem(size, tokens, run["rank"], torch.bfloat16, card.device))
            except Exception as error:
                rows.failed(f"{size} T={tokens}", error)
            card.free()


if __name__ == "__main__":
    main()
