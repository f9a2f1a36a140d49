"""Floors of the kernels that form dW and A' and contract their gradients: csrc/cuda/delta_*.cu with
their headers, scaled_basis.cu.

Each function gives bytes and operations of its kernel's one launch in a call: inputs read once,
outputs written once. A (compact) row of A' is read by many rows of dW; it counts once.
"""

from .floors import Floor, list_bytes, planes_bytes
from .work import ELEMENT, SUM, Work, ceil_div


def _dW(w: Work) -> float:
    return ELEMENT * w.basis.D * w.basis.d


def _terms(w: Work) -> float:
    """density^2 K additions for each entry of dW, or as many contracted with its gradient."""
    return w.nnz_b * w.basis.density * w.basis.d


# ---- B as lists ----------------------------------------------------------------------------------

_ENTRY, _POSITION = 4, 2  # bytes of Prepared::entry, ::position


def _prepared(w: Work) -> float:
    """The compact rows of A' in fp32, where they go, and B's entries by rank index."""
    return (SUM * w.basis.n + _POSITION) * w.nnz_a + _ENTRY * w.nnz_b


def prepare(w: Work) -> Floor:
    read = w.a_lists + list_bytes(w.basis) + w.lam + w.used * w.gam
    return Floor(read + _prepared(w), fma=w.nnz_a * w.basis.n)


def form(w: Work) -> Floor:
    offsets = 8 * (2 * w.basis.r + 1 + 2 * w.basis.D + 1)
    return Floor(_prepared(w) + offsets + _dW(w), fma=_terms(w))


def transpose(w: Work) -> Floor:
    """Reads the gradient, writes the columns that A uses."""
    return Floor(w.a_lists + (1 + w.used) * _dW(w))


def _gather_tiles(w: Work) -> int:
    """Of at most 4096 rows of G, each with a Z of its own."""
    return ceil_div(w.basis.D, 4096)


def _Z(w: Work) -> float:
    return SUM * _gather_tiles(w) * w.nnz_a * w.basis.n


def gather(w: Work) -> Floor:
    read = w.used * _dW(w) + w.a_lists + list_bytes(w.basis, True)
    return Floor(read + _Z(w), fma=_terms(w))


def contract(w: Work) -> Floor:
    """dlambda and dgamma: each adds the tiles of Z, multiplies, and adds."""
    moved = w.a_lists + _Z(w) + 2 * w.lam + (1 + w.used) * w.gam
    return Floor(moved, fma=2 * w.nnz_a * w.basis.n * (_gather_tiles(w) + 1))


# ---- B as planes ---------------------------------------------------------------------------------

_TILE = 4 * 128 * 4  # bytes of codes: 4 words for each of 128 lines


def _row_codes(w: Work) -> float:
    b = w.basis
    return _TILE * ceil_div(b.D, 128) * ceil_div(b.n, 16) * ceil_div(b.r, 4)


def _column_codes(w: Work) -> float:
    b = w.basis
    return _TILE * ceil_div(b.D, 64) * ceil_div(b.n, 16) * ceil_div(b.r, 8)


def _signs(w: Work) -> float:
    """A byte for each element of A, rank indices padded to octets."""
    return ceil_div(w.basis.r, 8) * 8 * w.basis.d


def _gemm(w: Work) -> float:
    return 2 * w.basis.D * w.basis.K * w.basis.d


def row_codes(w: Work) -> Floor:
    return Floor(planes_bytes(w.basis) + _row_codes(w))


def column_codes(w: Work) -> Floor:
    return Floor(planes_bytes(w.basis) + _column_codes(w))


def signs(w: Work) -> Floor:
    return Floor(w.a_lists + _signs(w))


def delta_planes(w: Work) -> Floor:
    """B decoded, lambda * A * gamma formed on the fly: once for each entry of A', at the least."""
    moved = _row_codes(w) + _signs(w) + w.lam + w.gam + _dW(w)
    return Floor(moved, matrix=_gemm(w), fma=w.basis.K * w.basis.d)


def _gradient_parts(w: Work) -> float:
    """Bytes: of dlambda for every 128 columns, of dgamma for every 8 rank indices."""
    return ceil_div(w.basis.d, 128) * w.lam + ceil_div(w.basis.r, 8) * w.gam


def delta_planes_backward(w: Work) -> Floor:
    read = _column_codes(w) + _signs(w) + w.lam + w.gam + _dW(w)
    return Floor(read + _gradient_parts(w), matrix=_gemm(w), fma=2 * w.nnz_a * w.basis.n)


def delta_gradients(w: Work) -> Floor:
    parts = _gradient_parts(w)
    return Floor(parts + w.lam + w.gam, fma=parts / SUM)


# ---- A' ------------------------------------------------------------------------------------------


def _factors(w: Work) -> float:
    """A, dense in fp32, lambda and gamma."""
    return SUM * w.basis.r * w.basis.d + w.lam + w.gam


def _scaled(w: Work) -> float:
    return ELEMENT * w.basis.K * w.basis.d


def scaled_basis(w: Work) -> Floor:
    return Floor(_factors(w) + _scaled(w), fma=2 * w.basis.K * w.basis.d)


def _sums(w: Work) -> list[tuple[int, float]]:
    """Parts and bytes of dlambda (by 256 columns) and of dgamma (by 32 rank indices)."""
    return [(ceil_div(w.basis.d, 256), w.lam), (ceil_div(w.basis.r, 32), w.gam)]


def scaled_basis_backward(w: Work) -> Floor:
    written = sum(parts * size for parts, size in _sums(w))
    return Floor(_factors(w) + _scaled(w) + written, fma=3 * w.basis.K * w.basis.d)


def sum_parts(w: Work) -> Floor:
    """Of those sums that have several parts."""
    several = [(parts, size) for parts, size in _sums(w) if parts > 1]
    return Floor(
        sum((parts + 1) * size for parts, size in several),
        fma=sum((parts - 1) * size / SUM for parts, size in several),
    )


FLOORS = {
    "prepare_kernel": prepare,
    "form_kernel": form,
    "transpose_kernel": transpose,
    "gather_kernel": gather,
    "contract_kernel/2": contract,
    "row_codes_kernel": row_codes,
    "column_codes_kernel": column_codes,
    "signs_kernel": signs,
    "delta_planes_kernel": delta_planes,
    "delta_planes_backward_kernel": delta_planes_backward,
    "delta_gradients_kernel": delta_gradients,
    "scaled_basis_kernel": scaled_basis,
    "scaled_basis_backward_kernel": scaled_basis_backward,
    "sum_parts_kernel": sum_parts,
}
