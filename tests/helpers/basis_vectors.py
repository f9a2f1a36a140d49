"""The packed formats in plain NumPy, and a reader for tests/data/*.txt."""

import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).parents[1] / "data"
VECTOR_FILE, HADAMARD_FILE = DATA / "basis_v1.txt", DATA / "hadamard_v1.txt"
SYMBOLS = np.array(list("-0+"))


def read_vectors(path: Path) -> dict[str, list[list[str]]]:
    """Records by keyword, each a list of its fields as text."""
    records: dict[str, list[list[str]]] = defaultdict(list)
    for line in path.read_text(encoding="ascii").splitlines():
        keyword, *fields = line.split() or ["#"]
        if not keyword.startswith("#"):
            records[keyword].append(fields)
    return dict(records)


def to_signs(values: NDArray[np.int8]) -> str:
    """A row of elements as '+', '-' and '0'."""
    return "".join(SYMBOLS[values + 1])


def to_planes(values: NDArray[np.int8]) -> NDArray[np.int64]:
    """Elements (R, C) to bit planes int64 (2, R, ceil(C / 64)); plane 0 is +1, plane 1 is -1."""
    rows, cols = values.shape
    bits = np.zeros((2, rows, -(-cols // 64) * 64), dtype=np.uint8)
    bits[0, :, :cols], bits[1, :, :cols] = values == 1, values == -1
    return np.packbits(bits, axis=-1, bitorder="little").view("<i8").astype(np.int64)


def from_planes(planes: NDArray[np.int64], cols: int) -> NDArray[np.int8]:
    """Bit planes back to elements (R, cols)."""
    octets = np.ascontiguousarray(planes, dtype="<i8").view(np.uint8)
    bits = np.unpackbits(octets, axis=-1, bitorder="little")[..., :cols].astype(np.int8)
    return bits[0] - bits[1]


def planes_digest(planes: NDArray[np.int64]) -> str:
    """SHA-256 of the planes in memory order, words as little-endian 64-bit integers."""
    return hashlib.sha256(np.ascontiguousarray(planes, dtype="<i8").tobytes()).hexdigest()


def to_lists(
    values: NDArray[np.int8], by_column: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Elements (R, C) to sorted sign-split lists (offset, index), of rows or of columns."""
    chunks = [
        np.flatnonzero(line == sign)
        for line in (values.T if by_column else values)
        for sign in (1, -1)
    ]
    offset = np.cumsum([0] + [len(chunk) for chunk in chunks])
    return offset.astype(np.int64), np.concatenate(chunks).astype(np.int64)
