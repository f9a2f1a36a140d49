"""The layers that `layers` times against float64, which the CPU computes: are they right?

y, dx and the gradients of lambda and gamma, on bases of every kind, in three dtypes.
"""

import argparse

import torch
from methods import basis_of

from randlora_ext.diagnostics import LIMITS, relative_error

from . import rows
from .card import Card
from .layers import BASES, DENSE, RANK, SIZES

TOKENS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    card = Card(parser.parse_args().dry)
    sizes, rank = ([(64, 72)], 8) if card.dry else (SIZES, RANK)
    for size in sizes:
        dtypes = [torch.bfloat16, torch.float32, torch.float16][: 3 if size == sizes[0] else 1]
        for bases in [*BASES[:3], DENSE]:  # the most telling first
            basis = basis_of(bases, size, rank)
            for dtype in dtypes:
                about = {"bases": bases, "dtype": str(dtype), "size": size}
                if rows.seconds_left() < 10:
                    rows.skipped(str(about))
                    continue
                try:
                    error = relative_error(basis, TOKENS, dtype, card.device)
                    rows.row(**about, error=error)
                    if not error < LIMITS[dtype]:  # true for NaN, too
                        raise ValueError(f"relative error {error:.1e}")
                except Exception as failure:
                    rows.failed(str(about), failure)
            card.free()


if __name__ == "__main__":
    main()
