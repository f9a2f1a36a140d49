"""Every operator's time beside its floors, and that of each kernel it is made of beside its own.

`us` is the time on the card with the L2 flushed before (median); `byte_us` and `operation_us` are
the floors of floors.py at the rates that ceilings.py measured on this card; `over_floor` is us over
the larger. `kernels` are those of the profiler, caches warm, with the same three of
kernel_floors.py. "whole basis" is the packed basis of a layer from nothing; `wall_us` counts what
the host adds.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from randlora_ext import TernaryBasis

from . import floors
from .card import Card
from .ceilings import facts
from .floors import Floor
from .kernel_floors import beside_floors
from .stage import BALANCED, DENSITIES, RANK, SIZES, Stage, basis_of, size_text
from .work import Work

ops = torch.ops.randlora
BF16 = torch.bfloat16


@dataclass
class Op:
    name: str
    call: Callable[[], object]
    floor: Floor
    work: Work  # what the floors of its kernels need
    tokens: int | None = None
    waits: bool = False  # for the card, so that no graph can hold it


def generation(b: TernaryBasis, device: torch.device) -> Iterator[Op]:
    if b.format == "balanced":
        yield Op("whole basis", lambda: b._pack(device), floors.whole_basis(b),
                 Work(b, listed=(((b.r, b.d), False),)), waits=True)  # fmt: skip
        return
    planes = b._b_planes(device)
    threshold = max(1, int(b.density * 2.0**31 + 0.5))
    A, B = (b.r, b.d), (b.D, b.K)
    lists_of_b = ((B, False), (B, True)) if b.format == "lists" else ()
    yield Op("whole basis", lambda: b._pack(device), floors.whole_basis(b),
             Work(b, generated=(A, B), listed=((A, False), *lists_of_b)), waits=True)  # fmt: skip
    fill = (planes, b.seed, 1, 0, 0, b.K, threshold)
    yield Op("fill_planes", lambda: ops.fill_planes_(*fill), floors.fill_planes(b),
             Work(b, generated=(B,)))  # fmt: skip
    wide = max(b.D, b.K) > 65536
    for by_column in (False, True):
        yield Op(f"planes_to_lists by {'column' if by_column else 'row'}",
                 lambda by_column=by_column: ops.planes_to_lists(planes, b.K, by_column, wide),
                 floors.planes_to_lists(b, by_column), Work(b, listed=((B, by_column),)),
                 waits=True)  # fmt: skip
    yield Op(f"dense B from {b.format}", lambda: b._dense_b(device, BF16), floors.expansion(b),
             Work(b))  # fmt: skip
    dense = ops.planes_to_dense(planes, b.K, 0.5, BF16)
    pack = Floor(floors.planes_bytes(b) + floors.dense_bytes(b))
    yield Op("pack_dense", lambda: ops.pack_dense(dense), pack, Work(b), waits=True)


def formation(b: TernaryBasis, lam: torch.Tensor, gam: torch.Tensor) -> Iterator[Op]:
    packed, scale, sizes = b.packed(lam.device), b.scale, (b.out_features, b.in_features)
    A = b.dense_a(lam.device, BF16)
    grad = torch.randn(b.K, b.d, device=lam.device).to(BF16)
    floor, work = floors.scaled_basis(b), Work(b)
    yield Op("scaled_basis", lambda: ops.scaled_basis(A, lam, gam), floor, work)
    yield Op("scaled_basis backward",
             lambda: ops.scaled_basis_backward(grad, A, lam, gam), floor, work)  # fmt: skip
    low, high = lam.to(BF16), gam
    G = torch.randn(*sizes, device=lam.device).to(BF16)
    floor = floors.delta_weight(b)
    yield Op("delta_weight",
             lambda: ops.delta_weight(low, high, packed, scale, *sizes), floor, work)  # fmt: skip
    yield Op("delta_weight backward",
             lambda: ops.delta_weight_backward(G, lam, gam, packed, scale),
             floor, work)  # fmt: skip


def factored(
    b: TernaryBasis, lam: torch.Tensor, gam: torch.Tensor, tokens: int
) -> Iterator[Op]:  # fmt: skip
    device, out = lam.device, b.out_features
    x = torch.randn(tokens, b.in_features, device=device).to(BF16)
    dy = torch.randn(tokens, out, device=device).to(BF16)
    for dense in (False,) if b.format == "balanced" else (False, True):
        packed = b.packed(device)
        if dense:
            packed = [*packed, b.dense_b(device, BF16)]
        last = (lam, gam, packed, b.scale)
        side = "dense B" if dense else "packed B"
        yield Op(f"linear, {side}",
                 lambda last=last: ops.linear(x, None, None, *last, out, "factored"),
                 floors.linear(b, tokens, dense), Work(b, tokens), tokens)  # fmt: skip
        yield Op(f"linear backward, {side}",
                 lambda last=last: ops.linear_backward(dy, x, None, *last, "factored", True, True),
                 floors.linear_backward(b, tokens, dense), Work(b, tokens, True),
                 tokens)  # fmt: skip


def all_ops(b: TernaryBasis, device: torch.device, tokens: list[int]) -> Iterator[Op]:
    lam = torch.randn(b.r, b.n, device=device)
    gam = torch.randn(b.n, b.d, device=device)
    yield from generation(b, device)
    yield from formation(b, lam, gam)
    for count in tokens:
        yield from factored(b, lam, gam, count)


def measure(card: Card, op: Op, ceilings: dict) -> dict:
    call, timing = op.call, "host clock" if card.dry else "events"
    call()
    if not op.waits and not card.dry:
        try:
            call, timing = card.captured(op.call), "graph"
        except Exception as error:  # launch gaps are then in the time
            print(f"no graph of {op.name}: {error!r}", flush=True)
            card.sync()
    row: dict = {"us": card.medians({"": call}, 0.08, most=20)[""] * 1e3, "timing": timing}
    if op.name == "whole basis":
        row["wall_us"] = card.wall(op.call) * 1e3
    row["byte_us"], row["operation_us"] = (
        op.floor.byte_us(ceilings), op.floor.operation_us(ceilings)
    )  # fmt: skip
    row["over_floor"] = row["us"] / max(row["byte_us"], row["operation_us"])
    try:
        row["kernels"] = beside_floors(card.kernels(op.call), op.work, ceilings)
    except Exception as error:  # the times stand without the breakdown
        row["kernels"], row["profiler"] = [], repr(error)[:200]
    return row


def ceilings_of(card: Card) -> dict:
    """What ceilings.py wrote, handed over by gpu_run.py; the H100's datasheet without that."""
    path = os.environ.get("RANDLORA_CEILINGS")
    if path and Path(path).is_file():
        return json.loads(Path(path).read_text())
    return {**facts(card), "copy_bytes_per_s": 3.35e12, "bf16_flop_per_s": 989e12,
            "fma_per_s": 33.5e12, "integer_per_s": 14.4e12}  # fmt: skip


def main() -> None:
    stage = Stage(__doc__)
    card = Card(stage.dry)
    ceilings = ceilings_of(card)
    sizes = [(40, 72)] if stage.dry else SIZES[:2]
    tokens = [3, 20] if stage.dry else [8192, 16]
    for size in sizes:
        for density in (*DENSITIES, BALANCED):
            basis = basis_of(density, size, 8 if stage.dry else RANK)
            about = {"size": size_text(size), "density": density}
            try:
                for op in all_ops(basis, card.device, tokens):
                    if stage.left() < 1:
                        stage.skip(f"{op.name} and what follows at {about}", "out of time")
                        break
                    try:
                        result = measure(card, op, ceilings)
                        stage.row(op=op.name, **about, tokens=op.tokens, **result)
                    except Exception as error:
                        stage.failed(f"{op.name} {about} T={op.tokens}", error)
            except Exception as error:  # while the operands were made
                stage.failed(f"operators at {about}", error)
            card.free()


if __name__ == "__main__":
    main()
