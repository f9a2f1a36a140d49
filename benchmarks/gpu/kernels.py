"""Every operator alone, L2 flushed, with the bytes and operations of its floor (floors.py).

With --once each operator is called once and not timed, so that Nsight Compute can measure it.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator

import torch
from methods import basis_of

from randlora_ext import _C, TernaryBasis
from randlora_ext.ops import hadamard
from randlora_ext.ops.independent import operands

from . import floors, rows
from .card import Card
from .floors import Ceilings, Floor
from .layers import BASES, RANK

ops = torch.ops.randlora
BF16 = torch.bfloat16
SIZES, TOKENS = [(4096, 4096), (4096, 14336)], [8192, 16]
Op = tuple[str, int | None, Callable[[], object], Floor]  # name, tokens
# They wait for the card, so no graph can capture them: their times include launch gaps.
WAITING = ("whole basis", "planes_to_lists")


def of_bases(b: TernaryBasis, device: torch.device) -> Iterator[Op]:
    seeds = itertools.count(1)  # a new basis at every call: no cache has it

    def whole_basis() -> None:
        size = b.in_features, b.out_features
        TernaryBasis(*size, b.r, b.density, next(seeds), b.kind).packed(device)

    yield "whole basis", None, whole_basis, floors.whole_basis(b)
    planes = torch.empty(2, b.D, -(-b.K // 64), dtype=torch.int64, device=device)
    fill = (planes, b.seed, 1, 0, 0, b.K, _C.threshold(b.density))
    yield "fill_planes_", None, lambda: ops.fill_planes_(*fill), floors.fill_planes(b)
    wide = max(b.D, b.K) > 65536
    for by_column, what in ((False, "rows"), (True, "columns")):
        call = (planes, b.K, by_column, wide)
        yield (f"planes_to_lists, {what}", None, lambda call=call: ops.planes_to_lists(*call),
               floors.planes_to_lists(b, by_column))  # fmt: skip
    floor = floors.expansion(b)
    if b.format == "planes":
        yield "planes_to_dense", None, lambda: ops.planes_to_dense(planes, b.K, 1.0, BF16), floor
    else:
        rows_of_b = b.packed(device)[3:5]
        yield "lists_to_dense", None, lambda: ops.lists_to_dense(*rows_of_b, b.K, 1.0, BF16), floor


def of_weights(b: TernaryBasis, device: torch.device) -> Iterator[Op]:
    lam, gam = diagonals(b, device)
    A, grad = b.dense_a(device, BF16), torch.randn(b.K, b.d, device=device).to(BF16)
    floor = floors.scaled_basis(b)
    yield "scaled_basis", None, lambda: ops.scaled_basis(A, lam, gam), floor
    backward = (grad, A, lam, gam)
    yield "scaled_basis backward", None, lambda: ops.scaled_basis_backward(*backward), floor


def of_layers(b: TernaryBasis, device: torch.device, tokens: int) -> Iterator[Op]:
    """The adapter without the base layer's GEMM, which is torch's."""
    x, dy = (
        torch.randn(tokens, n, device=device).to(BF16) for n in (b.in_features, b.out_features)
    )
    last = *diagonals(b, device), *operands(b, device)
    yield ("independent_linear", tokens, lambda: ops.independent_linear(x, None, None, *last),
           floors.linear(b, tokens))  # fmt: skip
    yield ("independent_linear backward", tokens,
           lambda: ops.independent_linear_backward(dy, x, None, *last, True, True),
           floors.linear_backward(b, tokens))  # fmt: skip


def of_hadamard(b: TernaryBasis, device: torch.device, tokens: list[int]) -> Iterator[Op]:
    """The operators on Hadamard bases, without the base layer's GEMM."""
    bases = *diagonals(b, device), *hadamard.operands(b, device)
    W = torch.randn(b.out_features, b.in_features, device=device).to(BF16)
    yield ("hadamard_weight", None, lambda: ops.hadamard_weight(W, *bases),
           floors.hadamard_weight(b))  # fmt: skip
    for count in tokens:
        x, dy = (torch.randn(count, n, device=device).to(BF16) for n in W.shape[::-1])
        forward, backward = floors.hadamard(b, count)
        yield ("hadamard_linear", count,
               lambda x=x: ops.hadamard_linear(x, None, None, *bases), forward)  # fmt: skip
        yield ("hadamard_linear backward", count,
               lambda x=x, dy=dy: ops.hadamard_linear_backward(
                   dy, x, None, *bases, True, True), backward)  # fmt: skip


def diagonals(b: TernaryBasis, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(b.r, b.n, device=device), torch.randn(b.n, b.d, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--once", action="store_true", help="each operator once, of one size")
    parser.add_argument("--rates", type=json.loads, help="JSON, what the card can do; for floors")
    options = parser.parse_args()
    card = Card(options.dry)
    rates = Ceilings(**options.rates) if options.rates else None
    sizes, tokens, rank = ([(64, 72)], [20, 3], 8) if options.dry else (SIZES, TOKENS, RANK)
    for size in sizes[:1] if options.once else sizes:
        for bases in BASES:
            about = {"size": f"{size[0]}x{size[1]}", "bases": bases}
            if rows.seconds_left() < 10:
                rows.skipped(str(about))
                continue
            b = basis_of(bases, size, rank)
            try:
                if b.kind == "hadamard":
                    every = [*of_hadamard(b, card.device, tokens)]
                else:
                    every = [*of_bases(b, card.device), *of_weights(b, card.device)]
                    for count in tokens:
                        every += of_layers(b, card.device, count)
            except Exception as error:
                rows.failed(str(about), error)
                continue
            for name, count, call, floor in every:
                what = {"op": name, "tokens": count, **about}
                try:
                    call()
                    if not options.once:
                        graph = call if name.startswith(WAITING) else card.captured(call)
                        us = card.medians({"": graph})[""] * 1e3
                        rows.row(**what, us=us, **(floor.beside(us, rates) if rates else {}))
                except Exception as error:
                    rows.failed(str(what), error)
                    card.sync()
            card.free()


if __name__ == "__main__":
    main()
