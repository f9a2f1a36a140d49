"""Floors of balanced bases: of the kernels that only they have (csrc/cuda/fill_balanced.cu,
balanced.cu, b_balanced.cu), and of those on which the products of both sides run.

Each function gives bytes and operations of all launches of its kernel in a call.
"""

from .floors import INTEGERS_PER_ELEMENT, Floor, balanced_of, index_bytes, planes_of
from .work import ELEMENT, Work, ceil_div

_KEY, _COUNT, _AT = 4, 8, 4  # bytes


def _drawn(w: Work) -> list[tuple[int, int]]:
    """Lines and n of the matrices that a call draws: B, and A where there is a second launch."""
    b = w.basis
    return [(b.D, b.n), (b.d, 1)][: round(w.launches)]


def _used(w: Work) -> tuple[int, int]:
    """Of the matrix whose packed form is read: A while a basis is made, B by its products."""
    return (w.basis.d, 1) if w.listed else (w.basis.D, w.basis.n)


def _entries(w: Work, lines: int) -> float:
    return w.basis.density * w.basis.r * lines


def _values(w: Work, lines: int) -> float:
    return ELEMENT * _entries(w, lines) * ceil_div(w.basis.n, 8) * 8


def _support(w: Work, lines: int) -> float:
    """Support::entry and Support::at."""
    return _AT * (_entries(w, lines) + w.basis.r * lines)


def draw_keys(w: Work) -> Floor:
    keys = w.basis.r * sum(lines for lines, _ in _drawn(w))
    return Floor(_KEY * keys, integer=INTEGERS_PER_ELEMENT * keys)


def choose(w: Work) -> Floor:
    """A comparison for every two groups of a line."""
    r, lines = w.basis.r, sum(lines for lines, _ in _drawn(w))
    return Floor((_KEY + 1) * r * lines + _COUNT * r * w.launches, integer=r**2 * lines)


def place(w: Work) -> Floor:
    total = Floor(0)
    for lines, n in _drawn(w):
        calls = _entries(w, lines) * ceil_div(n, 128)  # of Philox; elsewhere one has 4 elements
        moved = w.basis.r * (lines + _COUNT) + balanced_of(w.basis, lines, n)
        total += Floor(moved, integer=4 * INTEGERS_PER_ELEMENT * calls)
    return total


def find_lines(w: Work) -> Floor:
    lines, _ = _used(w)
    return Floor(w.launches * (_entries(w, lines) * index_bytes(w.basis) + _support(w, lines)))


def spread_signs(w: Work) -> Floor:
    lines, n = _used(w)
    return Floor(w.launches * (balanced_of(w.basis, lines, n) + _values(w, lines)))


def planes(w: Work) -> Floor:
    lines, n = _used(w)
    written = planes_of(lines, w.basis.r * n)
    return Floor(w.launches * (balanced_of(w.basis, lines, n) + _support(w, lines) + written))


def turn(w: Work) -> Floor:
    """V or U of a chunk, read and written."""
    return Floor(w.launches / w.chunks * 2 * ELEMENT * w.tokens * w.basis.K)


# ---- the products, on the kernels of a_up.cu, a_down.cu and panels.cu ----------------------------


def _ways_of_A(w: Work) -> tuple[bool, bool]:
    """Whether a call multiplies by A up, and down, on these kernels, not on those of a_few.cu."""
    many = w.tokens > 16 or w.tokens * w.basis.density > 1
    is_up = w.backward != w.basis.expand
    return is_up and many, not is_up and many


def _ways_of_B(w: Work) -> tuple[bool, bool]:
    """Backward where d == out multiplies up for dx and down for the gradients."""
    is_down = w.backward or not w.basis.expand
    return w.backward != w.basis.expand, is_down


def _product(w: Work, features: int, times: int) -> Floor:
    """(T, features) to or from (T, K); values and entries are read `times`."""
    entries = _entries(w, features)
    tokens = ELEMENT * w.tokens * (features + w.basis.K)
    again = _values(w, features) + _AT * entries
    return Floor(tokens + times * again, matrix=2 * entries * w.basis.n * w.tokens)


def up(w: Work) -> Floor:
    total = Floor(0)
    if _ways_of_A(w)[0]:
        total += _product(w, w.basis.d, w.parts) + Floor(w.parts * w.lam)
    if _ways_of_B(w)[1]:
        total += _product(w, w.basis.D, w.parts_of(w.basis.D))
    return total


def down(w: Work) -> Floor:
    total = Floor(0)
    for used, features in ((_ways_of_A(w)[1], w.basis.d), (_ways_of_B(w)[0], w.basis.D)):
        if used:
            sums = Floor(0, fma=_entries(w, features) * w.tokens)
            total += _product(w, features, w.chunks) + sums
    return total


def fill(w: Work) -> Floor:
    """Panels of what has D features, once, where `down` of B runs; other launches are A's."""
    of_B = w.parts_of(w.basis.D) if _ways_of_B(w)[1] else 0
    moved = (of_B > 0) * w.basis.D + (w.launches - of_B) / w.parts * w.basis.d
    return Floor(2 * ELEMENT * w.tokens * moved)


# ---- A of a balanced basis, turned in fp32 between its two packed forms --------------------------


def a_to_dense(w: Work) -> Floor:
    return Floor(planes_of(w.basis.d, w.basis.r) + 4 * w.basis.r * w.basis.d)


def a_to_planes(w: Work) -> Floor:
    return Floor(4 * w.basis.r * w.basis.d + planes_of(w.basis.r, w.basis.d))


# Of kernels that other bases have too: there their floor is another.
SHARED = {
    "up_kernel": up,
    "down_kernel": down,
    "fill": fill,
    "planes_to_dense_kernel": a_to_dense,
    "pack_dense_kernel": a_to_planes,
}

FLOORS = {
    "draw_keys": draw_keys,
    "choose": choose,
    "place": place,
    "find_lines": find_lines,
    "spread_signs": spread_signs,
    "planes_kernel": planes,
    "turn_kernel": turn,
}
