"""Every operator alone, L2 flushed, with the bytes and operations of its floor (floors.py).

--once     each operator once, not timed: what Nsight Compute measures
--ragged   likewise on small shapes with ragged ends, in every dtype: for compute-sanitizer. Results
           are only checked to be finite; tests/gpu compares them
--plant    an offset beyond its index, which memcheck must report; otherwise it watched nothing
"""

import argparse
import json
from collections.abc import Iterator

import torch
from methods import basis_of

from . import rows
from .card import Card
from .each_operator import Op, of_layers, that_make_bases
from .floors import Ceilings
from .layers import BASES, RANK

BF16 = torch.bfloat16
SIZES, TOKENS = [(4096, 4096), (4096, 14336)], [8192, 16]
DTYPES = [BF16, torch.float32, torch.float16, torch.float64]
RAGGED = [(70, 45, 7), (45, 70, 7), (136, 136, 8), (61, 61, 70), (1, 5, 3)]  # in, out, r


def plant(device: torch.device) -> None:
    offset = torch.tensor([0, 30000, 30000], device=device)
    index = torch.zeros(1, dtype=torch.int16, device=device)
    torch.ops.randlora.support_tables(offset, index, 8)


def ragged(device: torch.device, tokens: list[int]) -> Iterator[Op]:
    for dtype in DTYPES:  # time may run out: bf16 over all shapes first
        for *size, rank in RAGGED:
            for bases in ("hadamard", "1/3", "0.07"):
                b = basis_of(bases, (size[0], size[1]), rank, seed=1)
                if dtype is BF16:
                    yield from that_make_bases(b, device)
                for with_weight in (False, True):
                    yield from of_layers(b, device, dtype, tokens, with_weight)


def results(op: Op) -> list[torch.Tensor]:
    found = op.call()
    every = found if isinstance(found, (tuple, list)) else [found]
    return [t for t in every if isinstance(t, torch.Tensor)]


def watched(card: Card) -> None:
    calls = 0
    for op in ragged(card.device, [1, 19] if card.dry else [1, 19, 70]):
        if not all(bool(t.isfinite().all()) for t in results(op)):
            raise SystemExit(f"a result of {op.name} is not finite")
        calls += 1
    print(f"{calls} calls of operators, all finite")


def measure(card: Card, op: Op, about: dict, rates: Ceilings | None) -> None:
    call = op.call if op.waits else card.captured(op.call)
    us = card.medians({"": call})[""] * 1e3
    rows.row(**about, us=us, **(op.floor.beside(us, rates) if rates else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    for mode in ("once", "ragged", "plant"):
        parser.add_argument(f"--{mode}", action="store_true")
    parser.add_argument("--rates", type=json.loads, help="JSON, what the card can do; for floors")
    options = parser.parse_args()
    card = Card(options.dry)
    torch.manual_seed(0)
    if options.plant or options.ragged:
        plant(card.device) if options.plant else watched(card)
        return card.sync()
    rates = Ceilings(**options.rates) if options.rates else None
    sizes, tokens, rank = ([(64, 72)], [20, 3], 8) if options.dry else (SIZES, TOKENS, RANK)
    for size in sizes[:1] if options.once else sizes:
        for bases in BASES:
            about = {"size": f"{size[0]}x{size[1]}", "bases": bases}
            if rows.seconds_left() < 10:
                rows.skipped(str(about))
                continue
            b = basis_of(bases, size, rank)
            every = [*that_make_bases(b, card.device), *of_layers(b, card.device, BF16, tokens)]
            for op in every:
                what = {"op": op.name, "tokens": op.tokens, **about}
                try:
                    op.call() if options.once else measure(card, op, what, rates)
                except Exception as error:
                    rows.failed(str(what), error)
                    card.sync()
            card.free()


if __name__ == "__main__":
    main()
