"""What every stage has: a process of its own, a deadline, and rows that a kill cannot lose."""

import argparse
import json
import sys
import time
from pathlib import Path

from randlora_ext import TernaryBasis

# In x out of the layers that are measured, and the densities: PEFT's sparse, the paper's 93% sparse
# row, PEFT's very_sparse; and the balanced bases that stand beside them.
SIZES = [(4096, 4096), (14336, 4096), (1024, 4096)]
DENSITIES = ["1/3", "0.07", "1/sqrt(d)"]
BALANCED = "balanced 1/8"
RANK, SCALING = 32, 20.0


def density_of(text: str, d: int) -> float:
    """The number behind a label of DENSITIES."""
    if text == "1/sqrt(d)":
        return d**-0.5
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1)


def basis_of(label: str, size: tuple[int, int], rank: int) -> TernaryBasis:
    """Of a label of DENSITIES, or BALANCED."""
    if label == BALANCED:
        return TernaryBasis(*size, rank, 1 / 8, support="balanced")
    return TernaryBasis(*size, rank, density_of(label, min(size)))


def size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


class Stage:
    """Reads --rows, --budget and --dry; `row` appends a line of JSON to the file of --rows.

    Rows are flat dictionaries. `gpu_run.py` collects them, also of a stage that died.
    """

    def __init__(self, doc: str, arguments: list[str] | None = None) -> None:
        parser = argparse.ArgumentParser(description=doc.splitlines()[0])
        parser.add_argument("--rows", type=Path, help="file to which rows are appended")
        parser.add_argument("--budget", type=float, default=120.0, help="seconds")
        parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
        options = parser.parse_args(arguments)
        self.dry: bool = options.dry
        self._rows: Path | None = options.rows
        self._end = time.monotonic() + options.budget

    def left(self) -> float:
        """Seconds until the stage should be done."""
        return self._end - time.monotonic()

    def row(self, **values) -> None:
        text = json.dumps(values, default=str)
        if self._rows is not None:
            with self._rows.open("a") as file:
                file.write(text + "\n")
        print(text, flush=True)

    def skip(self, what: str, why: str) -> None:
        """A row that says what is missing, so that no table is silently short."""
        self.row(skipped=what, why=why)

    def failed(self, what: str, error: BaseException) -> None:
        """A row for what broke, where the stage can go on."""
        lines = str(error).strip().splitlines() or [""]
        self.row(failed=what, why=f"{type(error).__name__}: {lines[0][:300]}")
        print(f"{what}: {error!r}", file=sys.stderr, flush=True)
