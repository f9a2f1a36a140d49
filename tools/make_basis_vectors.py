"""Writes tests/data/*.txt from the NumPy reference: python tools/make_basis_vectors.py

A published specification never changes, so a rerun must reproduce the committed files byte for
byte. A difference means that the reference was broken, not that a file is out of date.
"""

import math
from pathlib import Path

import numpy as np
from basis_reference import hadamard, philox4x32_10, signs, ternary, threshold
from basis_vectors import (
    HADAMARD_FILE,
    VECTOR_FILE,
    planes_digest,
    to_lists,
    to_planes,
    to_signs,
)

HEADER = """\
# randlora_ext basis specification, version 1: known-answer vectors (docs/basis-spec.md).
# Written by tools/make_basis_vectors.py from tests/helpers/basis_reference.py. One record a line: a
# keyword, then fields separated by single spaces. Empty lines and lines that begin with '#' are
# ignored.
# Philox words are hexadecimal, all other integers decimal. A density is the shortest decimal that
# reads back as the same fp64 number. Role 0 is A, role 1 is B.
#
# philox    c0 c1 c2 c3 k0 k1 o0 o1 o2 o3          counter, key, output of Philox4x32-10
# threshold density t
# elements  seed role row col count density signs  elements (row, col .. col + count - 1) as + - 0
# counts    seed role row col rows cols density plus minus
#           how many +1 and -1 are in rows row .. row + rows - 1, columns col .. col + cols - 1
# planes    seed role row col rows cols density sha256
#           SHA-256 of the slice as bit planes: 64-bit words, little-endian bytes, in the order
#           [plane][row][word] of an int64 [2, rows, ceil(cols / 64)]
# lists     seed role row col rows cols density by offset index
#           the slice as sorted sign-split lists, by = row or column; offset and index with commas
"""

HADAMARD_HEADER = """\
# randlora_ext basis specification hadamard-1: known answers (docs/basis-spec.md, section 14).
# Written by tools/make_basis_vectors.py from tests/helpers/basis_reference.py. The rules of lines
# are those of basis_v1.txt. Matrices are of a whole layer.
#
# signs         seed role first count signs  elements first .. first + count - 1 of the sequence of
#                                            role 3 (s), 4 (row) or 5 (col) as + and -
# matrix_row    in out r seed name row signs one row of A or B
# matrix_planes in out r seed name sha256    SHA-256 of all of A or B as bit planes, as in
#                                            basis_v1.txt
"""

# Random123, tests/kat_vectors, the three lines "philox4x32 10": all zeros, all ones, digits of pi.
PUBLISHED = """\
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""

# One-hot counters and keys: swapped words or key halves cannot pass.
OWN_PHILOX = [
    ((1, 0, 0, 0), (0, 0)),
    ((0, 1, 0, 0), (0, 0)),
    ((0, 0, 1, 0), (0, 0)),
    ((0, 0, 0, 1), (0, 0)),
    ((0, 0, 0, 1), (1, 0)),
    ((0, 0, 0, 1), (0, 1)),
    ((21, 5, 1, 1), (42, 0)),  # the worked example of docs/basis-spec.md
]

SPARSE, MIDDLE, VERY_SPARSE = 1 / 3, 0.07, 1 / math.sqrt(576)
DENSITIES = [
    1 / 3, 0.07, 1 / 64, VERY_SPARSE, 1 / math.sqrt(4096 * 2), 0.5, 1 - 2.0**-53, 1 - 2.0**-31, 1.0,
    1e-6, 1.5 * 2.0**-31, 2.5 * 2.0**-31, 2.0**-31, 2.0**-40, 5e-324,
]  # fmt: skip
LAST = 2**32 - 1

ELEMENTS = [  # seed, role, row, col, count, density
    (0, 0, 0, 0, 64, SPARSE),
    (0, 1, 0, 0, 64, SPARSE),
    (1, 0, 0, 0, 64, SPARSE),
    (2**32, 0, 0, 0, 64, SPARSE),
    (2**64 - 1, 0, 0, 0, 64, SPARSE),
    (2**64 - 1, 1, 7, 100, 64, SPARSE),
    (0x0123456789ABCDEF, 1, 1000, 37, 200, SPARSE),
    (42, 1, 5, 100, 1, SPARSE),
    (42, 1, 5, 96, 16, SPARSE),
    (3, 0, 31, 63, 2, SPARSE),
    (3, 0, 31, 1, 130, MIDDLE),
    (3, 1, 4095, 4000, 160, 1 / 64),
    (5, 1, 12, 575, 130, VERY_SPARSE),
    (9, 0, 3, 16, 64, 1.0),
    (9, 1, 3, 48, 100, 0.5),
    (9, 1, 3, 48, 100, 1e-6),
    (6, 1, LAST, 0, 70, SPARSE),
    (6, 1, 0, LAST - 70, 71, SPARSE),
    (6, 0, LAST, LAST, 1, 1.0),
    (2**63, 0, 2**31, 2**31 - 33, 66, SPARSE),
    (2**63 + 2**31, 1, 2**16, 2**16 - 5, 12, SPARSE),
]

SLICES = [  # seed, role, row, col, rows, cols, density
    (0, 0, 0, 0, 32, 4096, SPARSE),
    (0, 1, 0, 0, 576, 576, SPARSE),
    (11, 1, 0, 0, 576, 576, MIDDLE),
    (11, 1, 0, 0, 576, 576, VERY_SPARSE),
    (11, 1, 0, 0, 1024, 1024, 1 / 64),
    (2**64 - 1, 1, 100, 37, 129, 1001, SPARSE),
    (7, 0, LAST - 8, LAST - 200, 9, 201, 0.25),
    (7, 1, 77, 77, 1, 1, 1.0),
    (13, 1, 3, 5, 200, 1, SPARSE),
    (13, 0, 0, 0, 16, 256, 1.0),
]

LISTS = [
    (42, 0, 0, 0, 4, 96, 1 / 16, "row"),
    (42, 0, 0, 0, 4, 96, 1 / 16, "column"),
    (42, 1, 9, 50, 5, 33, SPARSE, "row"),
    (42, 1, 9, 50, 5, 33, SPARSE, "column"),
]

SIGNS = [  # seed, role, first, count
    *((seed, role, 0, 96) for seed in (0, 42, 2**64 - 1) for role in (3, 4, 5)),
    (42, 3, 61, 70),
    (2**32, 4, 65_530, 20),
    (2**63, 5, LAST - 70, 71),
]

WORKED_LAYER = (5, 7, 3, 42)  # of docs/basis-spec.md
LAYERS = [  # in, out, r, seed
    WORKED_LAYER,
    (1, 1, 1, 3),
    (1, 9, 4, 2**32 + 1),  # d = 1
    (61, 130, 7, 2**64 - 1),  # nothing is a power of two
    (300, 420, 30, 0),
    (20, 12, 32, 2**33 + 5),  # r > d
    (64, 64, 8, 2**63),
    (576, 192, 32, 2**40 + 3),
]


def slice_values(seed, role, row, col, rows, cols, density):
    """Elements of a slice, (rows, cols)."""
    row_index = np.arange(row, row + rows, dtype=np.uint64)[:, None]
    return ternary(seed, role, row_index, np.arange(col, col + cols, dtype=np.uint64), density)


def basis_lines():
    """basis_v1.txt line by line, without line ends."""
    yield HEADER + "\n# Published with Random123."
    yield from (f"philox {record}" for record in PUBLISHED.splitlines())
    yield "\n# Our own from here on."
    for counter, key in OWN_PHILOX:
        words = (*counter, *key, *philox4x32_10(counter, key).tolist())
        yield "philox " + " ".join(f"{word:08x}" for word in words)
    yield from (f"threshold {density!r} {threshold(density)}" for density in DENSITIES)
    for seed, role, row, col, count, density in ELEMENTS:
        signs = to_signs(slice_values(seed, role, row, col, 1, count, density)[0])
        yield f"elements {seed} {role} {row} {col} {count} {density!r} {signs}"
    for spec in SLICES:
        values, fields = slice_values(*spec), " ".join(map(repr, spec))
        yield f"counts {fields} {np.count_nonzero(values == 1)} {np.count_nonzero(values == -1)}"
        yield f"planes {fields} {planes_digest(to_planes(values))}"
    for *spec, by in LISTS:
        offset, index = to_lists(slice_values(*spec), by == "column")
        fields = " ".join(map(repr, spec))
        yield f"lists {fields} {by} {','.join(map(str, offset))} {','.join(map(str, index))}"


def hadamard_lines():
    """hadamard_v1.txt line by line, without line ends."""
    yield HADAMARD_HEADER
    for spec in SIGNS:
        yield f"signs {' '.join(map(str, spec))} {to_signs(signs(*spec))}"
    for layer in LAYERS:
        fields = " ".join(map(str, layer))
        for name, matrix in zip("AB", hadamard(*layer), strict=True):
            if layer == WORKED_LAYER:
                for row, values in enumerate(matrix):
                    yield f"matrix_row {fields} {name} {row} {to_signs(values)}"
            yield f"matrix_planes {fields} {name} {planes_digest(to_planes(matrix))}"


FILES = {VECTOR_FILE: basis_lines, HADAMARD_FILE: hadamard_lines}


def render(path: Path) -> str:
    """The whole file."""
    return "\n".join(FILES[path]()) + "\n"


if __name__ == "__main__":
    for path in FILES:
        path.write_text(render(path), encoding="ascii", newline="\n")
        print(f"wrote {path}")
