"""Floors of the kernels that only balanced bases have: csrc/cuda/fill_balanced.cu, balanced.cu,
b_balanced.cu. Their products run on up_kernel and down_kernel, as those of A do.

Each function gives bytes and operations of all launches of its kernel in a call, for B alone.
"""

from .floors import INTEGERS_PER_ELEMENT, Floor, index_bytes, planes_bytes
from .work import ELEMENT, Work, ceil_div

_KEY, _COUNT, _AT = 4, 8, 4  # bytes


def _entries(w: Work) -> float:
    return w.basis.density * w.basis.r * w.basis.D


def _packed(w: Work) -> float:
    """Rows, signs and offsets."""
    b = w.basis
    return _entries(w) * (index_bytes(b) + 4 * ceil_div(b.n, 32)) + _COUNT * (b.r + 1)


def _values(w: Work) -> float:
    return ELEMENT * _entries(w) * ceil_div(w.basis.n, 8) * 8


def _support(w: Work) -> float:
    """Support::entry and Support::at."""
    return _AT * (_entries(w) + w.basis.r * w.basis.D)


def draw_keys(w: Work) -> Floor:
    keys = w.basis.r * w.basis.D
    return Floor(w.launches * _KEY * keys, integer=w.launches * INTEGERS_PER_ELEMENT * keys)


def choose(w: Work) -> Floor:
    """A comparison for every two groups of a line."""
    b = w.basis
    moved = (_KEY + 1) * b.r * b.D + _COUNT * b.r
    return Floor(w.launches * moved, integer=w.launches * b.r**2 * b.D)


def place(w: Work) -> Floor:
    b = w.basis
    calls = _entries(w) * ceil_div(b.n, 128)  # of Philox, which otherwise serves four elements
    moved = b.r * b.D + _COUNT * b.r + _packed(w)
    return Floor(w.launches * moved, integer=w.launches * 4 * INTEGERS_PER_ELEMENT * calls)


def find_lines(w: Work) -> Floor:
    return Floor(w.launches * (_entries(w) * index_bytes(w.basis) + _support(w)))


def spread_signs(w: Work) -> Floor:
    return Floor(w.launches * (_packed(w) + _values(w)))


def planes(w: Work) -> Floor:
    return Floor(w.launches * (_packed(w) + _support(w) + planes_bytes(w.basis)))


def turn(w: Work) -> Floor:
    """V or U of a chunk, read and written."""
    return Floor(w.launches / w.chunks * 2 * ELEMENT * w.tokens * w.basis.K)


FLOORS = {
    "draw_keys": draw_keys,
    "choose": choose,
    "place": place,
    "find_lines": find_lines,
    "spread_signs": spread_signs,
    "planes_kernel": planes,
    "turn_kernel": turn,
}
