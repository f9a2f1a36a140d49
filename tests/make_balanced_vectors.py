"""Writes tests/data/basis_v2.txt from the NumPy reference: python tests/make_balanced_vectors.py

A published specification version never changes, so a rerun must reproduce the committed file byte
for byte.
"""

from pathlib import Path

import numpy as np
from balanced_reference import lines, signs, support
from basis_vectors import planes_digest, to_planes, to_signs
from numpy.typing import NDArray

VECTOR_FILE = Path(__file__).parent / "data" / "basis_v2.txt"
HEADER = """\
# randlora_ext basis specification, version 2: known-answer vectors (docs/balanced-spec.md).
# Written by tests/make_balanced_vectors.py from tests/balanced_reference.py. One record a line: a
# keyword, then fields separated by single spaces. Empty lines and lines that begin with '#' are
# ignored. Role 0 is A, whose lines are its columns; role 1 is B, whose lines are its rows.
#
# support  seed role line r q groups           with commas
# signs    seed role line group e count signs  elements e .. e + count - 1 of a group as + -
# packed   seed role line lines r q n offset row sign
#          the lines by group, as the operators take them: integers with commas, words of signs
#          hexadecimal
# planes   seed role line lines r q n sha256
#          SHA-256 of the lines as bit planes: 64-bit words, little-endian bytes, in the order
#          [plane][line][word] of an int64 [2, lines, ceil(r * n / 64)]
"""
LAST = 2**32 - 1

SUPPORTS = [  # seed, role, line, r, q
    (0, 0, 0, 32, 4),
    (0, 1, 0, 32, 4),
    (1, 1, 0, 32, 4),
    (2**32, 1, 0, 32, 4),
    (2**64 - 1, 1, LAST, 32, 2),
    (42, 1, 5, 32, 1),
    (42, 1, 5, 32, 8),
    (42, 1, 5, 33, 8),
    (42, 1, 5, 7, 7),
    (42, 0, 4095, 1, 1),
    (2**63, 0, 2**31, 1000, 10),
]
SIGNS = [  # seed, role, line, group, e, count
    (0, 0, 0, 0, 0, 64),
    (0, 1, 0, 0, 0, 64),
    (0, 1, 0, 1, 0, 64),
    (2**64 - 1, 1, 7, 31, 100, 64),
    (42, 1, LAST, 12, 31, 200),
    (42, 0, 9, 2**31 - 2, 0, 1),
    (42, 1, 9, 2**31 - 2, LAST - 70, 71),
]
PACKED = [  # seed, role, line, lines, r, q, n
    (42, 0, 3, 9, 6, 2, 1),
    (42, 1, 3, 9, 6, 2, 33),
]
PLANES = [  # likewise
    (0, 0, 0, 4096, 32, 4, 1),
    (0, 1, 0, 576, 32, 2, 18),
    (11, 1, 0, 300, 32, 8, 128),
    (11, 1, 100, 65, 7, 7, 129),
    (2**64 - 1, 1, LAST - 8, 9, 12, 1, 70),
    (7, 1, 77, 1, 1, 1, 1),
    (13, 0, 2**31, 130, 9, 3, 1),
]


def to_packed(
    values: NDArray[np.int8], r: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32]]:
    """Lines (rows, r * n) by group: offset (r + 1), row, sign (entries, ceil(n / 32))."""
    by_group = values.reshape(len(values), -1, r).transpose(2, 0, 1)
    inside = (by_group != 0).any(axis=2)
    offset = np.cumsum([0, *inside.sum(axis=1)])
    row = np.concatenate([np.flatnonzero(line) for line in inside])
    minus = by_group[inside] < 0
    bits = np.zeros((len(row), -(-minus.shape[1] // 32) * 32), dtype=np.uint8)
    bits[:, : minus.shape[1]] = minus
    return offset, row, np.packbits(bits, axis=1, bitorder="little").view("<u4")


def records():
    """The file line by line, without line ends."""
    yield HEADER
    for spec in SUPPORTS:
        yield f"support {' '.join(map(str, spec))} {','.join(map(str, support(*spec)))}"
    for seed, role, line, group, e, count in SIGNS:
        text = to_signs(signs(seed, role, line, group, count, e))
        yield f"signs {seed} {role} {line} {group} {e} {count} {text}"
    for spec in PACKED:
        offset, row, sign = to_packed(lines(*spec), spec[4])
        words = ",".join(f"{word:08x}" for word in sign.ravel())
        integers = [",".join(map(str, part)) for part in (offset, row)]
        yield f"packed {' '.join(map(str, spec))} {' '.join(integers)} {words}"
    for spec in PLANES:
        yield f"planes {' '.join(map(str, spec))} {planes_digest(to_planes(lines(*spec)))}"


def render() -> str:
    """The whole file."""
    return "\n".join(records()) + "\n"


if __name__ == "__main__":
    VECTOR_FILE.write_text(render(), encoding="ascii", newline="\n")
    print(f"wrote {VECTOR_FILE}")
