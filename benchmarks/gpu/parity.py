"""Bases of every kind at 4096 against float64: is a layer right, of the size that is then timed?

y, dx and the gradients of lambda and gamma, in three dtypes.
"""

import argparse

from methods import basis_of

from randlora_ext.diagnostics import LIMITS, relative_error

from . import rows
from .card import Card

RANK, TOKENS = 32, 40
# The most telling first. On a basis of dense matrices nothing but torch's GEMMs runs.
KINDS = ("hadamard", "1/3", "dense", "0.07")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    card = Card(parser.parse_args().dry)
    sizes, rank = ([(64, 72)], 8) if card.dry else ([(4096, 4096), (4096, 1024)], RANK)
    for size in sizes:
        bases = {kind: basis_of(kind, size, rank) for kind in KINDS}
        for dtype, limit in LIMITS.items():
            for kind, basis in bases.items():
                about = {"basis": kind, "dtype": str(dtype), "size": size}
                if rows.seconds_left() < 10:
                    rows.skipped(str(about))
                    continue
                try:
                    error = relative_error(basis, TOKENS, dtype, card.device)
                    rows.row(**about, error=error)
                    if not error < limit:  # true for NaN, too
                        raise ValueError(f"relative error {error:.1e}")
                except Exception as failure:
                    rows.failed(str(about), failure)
            card.free()


if __name__ == "__main__":
    main()
