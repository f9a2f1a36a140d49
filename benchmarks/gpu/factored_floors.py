"""Floors of the kernels of the factored path: csrc/cuda/a_*.cu, panels.cu, b_lists.cu, b_planes.cu.

Each function gives bytes and operations of all launches of its kernel in a call. A launch reads its
inputs once and writes its outputs once; tokens are shared out among the launches, all else is read
again by each.
"""

from .floors import Floor, dense_bytes, list_bytes, planes_bytes
from .work import ELEMENT, SUM, Work, ceil_div

# ---- A side --------------------------------------------------------------------------------------

_ENTRY = 4  # bytes of Support::entry, and of Support::at


def _bases(w: Work) -> int:
    """n padded to whole pieces of 16 bytes."""
    return ceil_div(w.basis.n, 8) * 8


def _values(w: Work) -> float:
    """The compact signed (lambda) gamma, a row of bases for each entry of A."""
    return ELEMENT * w.nnz_a * _bases(w)


def _products(w: Work) -> float:
    """One product with A' over all tokens, in operations."""
    return 2 * w.nnz_a * w.basis.n * w.tokens


def find_entries(w: Work) -> Floor:
    made = _ENTRY * (w.nnz_a + w.basis.r * w.basis.d)
    return Floor(w.launches * (w.a_lists + made))


def form_values(w: Work) -> Floor:
    """lambda is in the values of `down` alone: forward where d == out, backward where d == in."""
    for_down = w.backward == w.basis.expand
    moved = _ENTRY * w.nnz_a + w.used * w.gam + _values(w) + for_down * w.lam
    return Floor(w.launches * moved, fma=w.launches * for_down * 2 * w.nnz_a * w.basis.n)


def fill_panels(w: Work) -> Floor:
    """A part of (T, d) a launch, read and written. What the B side turns, where its operand has no
    room in shared memory, is no smaller."""
    return Floor(w.launches / w.parts * 2 * ELEMENT * w.tokens * w.basis.d)


def up(w: Work) -> Floor:
    """Panels of z, those columns that A uses, to V."""
    tokens = ELEMENT * w.tokens * (w.used * w.basis.d + w.basis.K)
    again = _values(w) + _ENTRY * w.nnz_a + w.lam
    return Floor(tokens + w.launches * again, matrix=_products(w))


def down(w: Work) -> Floor:
    """U to out (T, d); every product is added to its column in shared memory."""
    tokens = ELEMENT * w.tokens * (w.basis.K + w.basis.d)
    again = _values(w) + _ENTRY * w.nnz_a
    return Floor(tokens + w.launches * again, matrix=_products(w), fma=w.nnz_a * w.tokens)


def _grad_splits(w: Work) -> int:
    """Of the tokens of a part, each with a P of its own (ASideCall::grad)."""
    tiles = (int(w.nnz_a) // 128 + w.basis.r) * ceil_div(w.basis.n, 128 if w.basis.n > 32 else 32)
    most = min(ceil_div(w.part, 256), ceil_div(2 * w.multiprocessors, tiles))
    split = ceil_div(ceil_div(w.part, most), 64) * 64
    return ceil_div(w.part, split)


def _P(w: Work) -> float:
    return SUM * _grad_splits(w) * w.nnz_a * _bases(w)


def grad(w: Work) -> Floor:
    """Panels of z and U to P, which every part of a chunk but the first reads before."""
    tokens = ELEMENT * w.tokens * (w.used * w.basis.d + w.basis.K)
    moved = tokens + w.launches * _ENTRY * w.nnz_a + (2 * w.launches - w.chunks) * _P(w)
    return Floor(moved, matrix=_products(w))


def _lambda_parts(w: Work) -> float:
    """Bytes: a row of dlambda for every 32 columns."""
    return SUM * ceil_div(w.basis.d, 32) * w.basis.r * w.basis.n


def contract(w: Work) -> Floor:
    """P, lambda, gamma to dgamma and the parts of dlambda: the splits are added, then scaled, and
    an entry goes into one sum of each."""
    at = _ENTRY * w.basis.r * w.basis.d
    moved = at + _P(w) + w.lam + 2 * w.gam + _lambda_parts(w)
    terms = w.nnz_a * w.basis.n * (_grad_splits(w) + 3)
    return Floor(w.launches * moved, fma=w.launches * terms)


def sum_lambda(w: Work) -> Floor:
    parts = _lambda_parts(w)
    return Floor(w.launches * (parts + w.lam), fma=w.launches * parts / SUM)


def up_few(w: Work) -> Floor:
    b = w.basis
    tokens = ELEMENT * w.tokens * (b.d + b.K)
    terms = (b.n * b.d + w.nnz_a * b.n) * w.tokens  # gamma z, and its signed sums
    return Floor(tokens + w.launches * (w.a_lists + w.lam + w.gam), fma=terms)


def down_few(w: Work) -> Floor:
    b = w.basis
    tokens = ELEMENT * w.tokens * (b.K + b.d)
    terms = (b.K + w.nnz_a * b.n + w.used * b.n * b.d) * w.tokens  # lambda U, sums, gamma
    return Floor(tokens + w.launches * (w.a_lists + w.lam + w.used * w.gam), fma=terms)


# ---- B side --------------------------------------------------------------------------------------


def _either_way(w: Work, basis_bytes: float) -> float:
    """Bytes of a kernel whose name does not tell the direction, for they are the same in both: B
    and the tokens of a chunk on both sides, a launch."""
    tokens = ELEMENT * w.tokens / w.chunks * (w.basis.D + w.basis.K)
    return w.launches * (basis_bytes + tokens)


def _elements(w: Work) -> float:
    """Of B times tokens, over all launches."""
    return w.launches / w.chunks * w.basis.D * w.basis.K * w.tokens


def sum_lists(w: Work) -> Floor:
    lists = min(list_bytes(w.basis), list_bytes(w.basis, True))
    return Floor(_either_way(w, lists), fma=w.basis.density * _elements(w))


def gemm(w: Work) -> Floor:
    """Of the library that torch calls, on a dense B."""
    return Floor(_either_way(w, dense_bytes(w.basis)), matrix=2 * _elements(w))


def _b_splits(w: Work, is_up: bool) -> int:
    """Blocks that share the contraction of a tile (run in b_planes.cu)."""
    lines, depth = (w.basis.D, w.basis.K) if is_up else (w.basis.K, w.basis.D)
    line_blocks, T = ceil_div(lines, 128), w.chunk
    half = line_blocks * ceil_div(T, 128) < 2 * w.multiprocessors
    columns = 16 if T <= 16 else 64 if half else 128
    step = 256 if columns == 16 else 64
    steps = ceil_div(depth, step)
    resident = (2 if columns == 16 else 1) * w.multiprocessors
    wanted = resident // (line_blocks * ceil_div(T, columns))
    return ceil_div(depth, ceil_div(steps, max(1, min(wanted, steps))) * step)


def b_planes(w: Work) -> Floor:
    is_up = w.arguments[2] in ("true", "1")
    lines, depth = (w.basis.D, w.basis.K) if is_up else (w.basis.K, w.basis.D)
    splits = _b_splits(w, is_up)
    a_result = SUM * splits if splits > 1 else ELEMENT
    tokens = w.tokens * (ELEMENT * depth + a_result * lines)
    return Floor(w.launches * planes_bytes(w.basis) + tokens, matrix=2 * lines * depth * w.tokens)


def add_partial(w: Work) -> Floor:
    """After each direction whose tiles were shared: backward where d == out has both."""
    both = w.backward and not w.basis.expand
    ways = (True, False) if both else (w.basis.expand and not w.backward,)
    moved = added = 0.0
    for is_up in ways:
        splits, lines = _b_splits(w, is_up), w.basis.D if is_up else w.basis.K
        if splits > 1:
            moved += (SUM * splits + ELEMENT) * w.tokens * lines
            added += splits * w.tokens * lines
    return Floor(moved, fma=added)


FLOORS = {
    "find_entries": find_entries,
    "form_values": form_values,
    "fill": fill_panels,
    "up_kernel": up,
    "down_kernel": down,
    "grad_kernel": grad,
    "contract_kernel/1": contract,
    "sum_lambda": sum_lambda,
    "up_few_kernel": up_few,
    "down_few_kernel": down_few,
    "sum_lists": sum_lists,
    "b_planes_kernel": b_planes,
    "add_partial_kernel": add_partial,
}
