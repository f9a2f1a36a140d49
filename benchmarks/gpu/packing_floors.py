"""Floors of the kernels that generate and pack a basis: csrc/cuda/fill_planes.cu, lists.cu,
dense.cu.

Each function gives bytes and operations of all launches of its kernel in a call: those for every
matrix that is generated, or listed.
"""

from .floors import INTEGERS_PER_ELEMENT, Floor, dense_bytes, index_bytes, list_bytes, planes_bytes
from .work import ELEMENT, Matrix, Work, ceil_div

_THREADS = 256  # Device::max_threads of csrc/core/device.h: of a block


def _planes(rows: int, cols: int) -> float:
    return 2 * rows * ceil_div(cols, 64) * 8


def fill_planes(w: Work) -> Floor:
    elements = sum(rows * cols for rows, cols in w.generated)
    planes = sum(_planes(*matrix) for matrix in w.generated)
    return Floor(planes, integer=INTEGERS_PER_ELEMENT * elements)


# ---- lists ---------------------------------------------------------------------------------------


def _lines(matrix: Matrix, by_column: bool) -> Matrix:
    """The matrix whose rows are the lines of the lists."""
    rows, cols = matrix
    return (cols, rows) if by_column else (rows, cols)


def transpose_planes(w: Work) -> Floor:
    """Once to count and once to fill, of matrices that are listed by column."""
    by_column = [matrix for matrix, columns in w.listed if columns]
    moved = sum(_planes(*matrix) + _planes(*_lines(matrix, True)) for matrix in by_column)
    return Floor(2 * moved)


def count_lists(w: Work) -> Floor:
    """Reads planes, writes offsets."""
    lines = [_lines(*listed) for listed in w.listed]
    return Floor(sum(_planes(*matrix) + 8 * (2 * matrix[0] + 1) for matrix in lines))


_TILE = 4 * _THREADS  # numbers that a block scans


def _counts(w: Work) -> list[int]:
    return [2 * _lines(*listed)[0] for listed in w.listed]


def scan_tiles(w: Work) -> Floor:
    """In place, and the tiles' totals."""
    return Floor(sum(8 * (2 * count + ceil_div(count, _TILE)) for count in _counts(w)))


def add_totals(w: Work) -> Floor:
    """To every tile but the first, in place."""
    later = [(count - _TILE, ceil_div(count, _TILE) - 1) for count in _counts(w)]
    return Floor(sum(8 * (2 * count + tiles) for count, tiles in later if tiles > 0))


def fill_lists(w: Work) -> Floor:
    """Reads planes and offsets, writes positions."""
    moved = 0.0
    for matrix, by_column in w.listed:
        lines, length = _lines(matrix, by_column)
        positions = w.basis.density * lines * length * index_bytes(w.basis)
        moved += _planes(lines, length) + 8 * (2 * lines + 1) + positions
    return Floor(moved)


# ---- dense forms ---------------------------------------------------------------------------------


def planes_to_dense(w: Work) -> Floor:
    return Floor(planes_bytes(w.basis) + dense_bytes(w.basis))


def lists_to_dense(w: Work) -> Floor:
    return Floor(list_bytes(w.basis) + dense_bytes(w.basis))


_REPORT = 16  # bytes


def find_magnitude(w: Work) -> Floor:
    """One block, which finds an element that is not zero among the first it looks at."""
    looked_at = min(8 * _THREADS, w.basis.D * w.basis.K)
    return Floor(ELEMENT * looked_at + _REPORT)


def pack_dense(w: Work) -> Floor:
    return Floor(_REPORT + dense_bytes(w.basis) + planes_bytes(w.basis))


def report(w: Work) -> Floor:
    return Floor(2 * _REPORT)


FLOORS = {
    "fill_planes_kernel": fill_planes,
    "transpose_planes_kernel": transpose_planes,
    "count_lists_kernel": count_lists,
    "scan_tiles_kernel": scan_tiles,
    "add_totals_kernel": add_totals,
    "fill_lists_kernel": fill_lists,
    "planes_to_dense_kernel": planes_to_dense,
    "lists_to_dense_kernel": lists_to_dense,
    "find_magnitude_kernel": find_magnitude,
    "pack_dense_kernel": pack_dense,
    "report_kernel": report,
}
