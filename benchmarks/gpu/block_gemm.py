"""Can block bases train at LoRA's price on this card? Their products in plain torch; no extension.

A block basis of density 1/G makes both sides of dW = B A' block diagonal: A' (K, d) has G dense
blocks (K/G, d/G), and B (D, K) has G dense blocks (D/G, K/G) whose columns are interleaved (column
c belongs to block c % G), so that every output meets every input. Each product of a training step
is then one batched GEMM on slices of x, y, dy, dx, if V and U are kept feature-major, as (K, T).

    forward     V^T = A' x^T      y += V B^T
    backward    U^T = B^T dy^T    dx += U A'     P = U^T x (contracted into dlambda, dgamma)
    merged      y = x W'^T, dx = dy W' with W' = W + B A', formed once forward and once backward;
                of the above only U and P remain

Every method is checked against float64 first. Then everything is timed in turn, captured in CUDA
graphs, the L2 flushed before each call: 10 groups of some 35 calls and 16 rounds are 6,000
replays of 2 ms on average, 15 seconds; making the operands and graphs takes as long again.
"""

import argparse
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import rows
from .block_methods import Block, Merged, Problem, methods
from .card import Card

SIZES = [(4096, 4096), (4096, 14336)]  # in, out: d == in
TOKENS = [8192, 16, 2048, 512, 12]  # the most telling first; 12 needs a padded leading dimension
GROUPS = [8, 16]
RANK = 32
TOY = {"sizes": [(64, 64), (64, 96)], "tokens": [16, 3], "groups": [4, 2], "rank": 8}
LIMIT = {torch.float64: 1e-12, torch.bfloat16: 2e-2}  # of relative errors, in the 2-norm


def check(p: Problem, groups: list[int]) -> None:
    """A row for each method; in float64 one that is wrong ends the program."""
    for (name, density), method in methods(p, groups).items():
        about = {"method": name, "density": density, "dtype": str(p.dtype), "size": p.size}
        error = method.error()
        rows.row(**about, error=error)
        if not error < LIMIT[p.dtype]:  # true for NaN, too
            wrong = ValueError(f"relative error {error:.1e}")
            rows.failed(str(about), wrong)
            if p.dtype is torch.float64:
                raise wrong


def pieces(p: Problem, G: int) -> dict[str, tuple[Callable[[], object], float]]:
    """What the two paths consist of, each with the operations of its GEMMs."""
    b, merged = Block(p, G), Merged(p, G)
    blocks, u = b.blocks(), b.make_u()
    v, W, P = b.make_v(blocks), b.merged(blocks), b.make_p(u)
    y, dx = F.linear(p.x, p.W), p.dy @ p.W
    (d, D), T = p.size, p.tokens
    a_side, b_side = (2.0 * T * features * b.K / G for features in (d, D))
    frozen, formation = 4.0 * T * d * D, 2.0 * D * d * b.K / G**2
    made: dict[str, tuple[Callable[[], object], float]] = {
        "V": (lambda: b.make_v(blocks), a_side),
        "y += V B^T": (lambda: b.add_to_y(y, v), b_side),
        "U": (b.make_u, b_side),
        "dx += U A'": (lambda: b.add_to_dx(dx, u, blocks), a_side),
        "P": (lambda: b.make_p(u), a_side),
        "A' made": (b.blocks, 0.0),
        "P contracted": (lambda: b.contract(P), 0.0),
        "W' formed": (lambda: b.merged(blocks), formation),
        "factored, products alone": (lambda: b.step(blocks), frozen + 3 * a_side + 2 * b_side),
        "merged, products alone": (lambda: merged.step(W), frozen + a_side + b_side),
    }
    if T % 8:
        plain = Block(p, G, align=1)
        made["factored, products alone, V and U not padded"] = (
            lambda: plain.step(blocks), frozen + 3 * a_side + 2 * b_side,
        )  # fmt: skip
    return made


def measure(card: Card, p: Problem, groups: list[int]) -> None:
    """A row for each method and piece."""
    nothing = functools.partial(torch.add, p.x[0], 1)  # how much of a time is the graph's launch
    every: dict[tuple[str, str], tuple[Callable[[], object], float]] = {
        ("one small kernel", ""): (nothing, 0.0)
    }
    for key, method in methods(p, groups).items():
        every[key] = method.step, 0.0
    for G in groups:
        every |= {(name, f"1/{G}"): piece for name, piece in pieces(p, G).items()}
    about = {"size": f"{p.size[0]}x{p.size[1]}", "tokens": p.tokens}
    calls = {}
    for key, (call, _) in every.items():
        try:
            calls[key] = card.captured(call)
        except Exception as error:  # the others are still worth their time
            rows.failed(f"{key} {about}", error)
    times = card.medians(calls)
    for key, ms in times.items():
        more = {"tflop_per_s": every[key][1] / ms * 1e-9} if every[key][1] else {}
        over = {"over_frozen": ms / times["frozen", ""]}
        rows.row(method=key[0], density=key[1], **about, us=ms * 1e3, **over, **more)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    dry = parser.parse_args(arguments).dry
    if not dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA card; --dry runs toy sizes on the CPU")
    card = Card(dry)
    torch.manual_seed(0)
    for size in TOY["sizes"]:
        problem = Problem(size, 11, TOY["rank"], torch.float64, card.device)
        check(problem, TOY["groups"])
    full = {"sizes": SIZES, "tokens": TOKENS, "groups": GROUPS, "rank": RANK}
    run = TOY if dry else full
    for size in run["sizes"]:
        problem = Problem(size, 64, run["rank"], torch.bfloat16, card.device)
        check(problem, run["groups"])
    card.free()
    for tokens in run["tokens"]:
        for size in run["sizes"]:
            if rows.seconds_left() < 15:
                rows.skipped(f"{size} T={tokens}")
                continue
            try:
                problem = Problem(size, tokens, run["rank"], torch.bfloat16, card.device)
                measure(card, problem, run["groups"])
            except Exception as error:
                rows.failed(f"{size} T={tokens}", error)
            card.free()


if __name__ == "__main__":
    main()
