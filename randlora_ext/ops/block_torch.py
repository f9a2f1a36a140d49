"""Block bases in plain torch: for devices without our kernels (MPS, XPU, ROCm).

The same products as csrc/torch/block.cpp, which says how V and U (K, T) join the two sides: A' and
B are G dense blocks, those of A' over consecutive rows c, those of B over every G-th one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basis import TernaryBasis


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    basis: TernaryBasis,
    lam: Tensor,
    gam: Tensor,
    scaling: float,
) -> Tensor:
    """As `functional.linear` by the factored path; keeps x, weight, lam and gam for backward.

    Raises:
        ValueError: naming the argument, what it was and what is allowed.
    """
    _check(basis, x, weight, bias, lam, gam)
    a, b, rows = _blocks(basis, x)
    flat, lam = x.reshape(-1, x.shape[-1]), basis.held(lam)
    with _no_autocast(x):
        y = _Linear.apply(flat, weight, lam, gam, a, b, rows, scaling * basis.scale, basis.expand)
        y = y.view(*x.shape[:-1], basis.out_features)
        return y if bias is None else y + bias


def delta_weight(basis: TernaryBasis, lam: Tensor, gam: Tensor, scaling: float) -> Tensor:
    """As `functional.delta_weight`; summed in float32 or better."""
    _check_diagonals(basis, lam, gam)
    a, b, rows = _blocks(basis, lam.float() if lam.dtype.itemsize < 4 else lam)
    lam = basis.held(lam)
    scaled = _scaled(a, lam, gam, b.dtype)
    # The rows e that chunk h of d and chunk g of D have in common, padded to equal counts.
    cycles, Q, height = b.shape
    ends = _ends(a, lam, Q, rows).unsqueeze(-1).unsqueeze(-1)
    most = scaled.shape[1] // rows[0] + 2
    e = torch.arange(most * Q, device=lam.device).view(-1, Q) + ends[:-1] // Q * Q
    common = ((e >= ends[:-1]) & (e < ends[1:])).unsqueeze(-1)
    e = e.clamp(max=cycles * Q - 1)
    c = _row(e, Q, rows).clamp(0, scaled.shape[0] * scaled.shape[1] - 1)
    left, right = b.view(-1, height)[e] * common, scaled.flatten(0, 1)[c] * common
    with _no_autocast(lam):
        delta = torch.einsum("hmgo,hmgk->gohk", left, right).flatten(2).flatten(0, 1)
    delta = (delta * (scaling * basis.scale)).to(lam.dtype)
    return delta if basis.expand else delta.T


def _check(basis, x, weight, bias, lam, gam) -> None:
    """What the operators check; plain torch would broadcast or view much that they refuse."""
    sizes = basis.out_features, basis.in_features
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor, got {x.dtype}")
    _check_diagonals(basis, lam, gam)
    if bias is not None and weight is None:
        raise ValueError("bias was given without a weight; add it to the base output")
    for name, value, shape in (("weight", weight, sizes), ("bias", bias, sizes[:1])):
        if value is not None and (tuple(value.shape) != shape or value.dtype != x.dtype):
            raise ValueError(
                f"{name} must be {shape} in the dtype of x, {x.dtype}, got "
                f"{tuple(value.shape)} {value.dtype}"
            )


def _check_diagonals(basis: TernaryBasis, lam: Tensor, gam: Tensor) -> None:
    for name, value, shape in (("lam", lam, (basis.r, basis.n)), ("gam", gam, (basis.n, basis.d))):
        if tuple(value.shape) != shape or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a floating tensor {shape}, got {tuple(value.shape)} {value.dtype}"
            )


def _no_autocast(like: Tensor):
    return torch.autocast(like.device.type, enabled=False)


def _blocks(basis: TernaryBasis, like: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Signs of A (chunks of d, q, d / G), B (cycles, chunks of D, D / G) in the dtype of `like`,
    and (G, first), from which `_row` computes c."""
    a, b = basis.packed(like.device)[0], basis.dense_b(like.device, like.dtype)
    a, held = a.view(basis.d // a.shape[1], -1, a.shape[1]), basis.chunks
    if held is None:
        return a, b.view(-1, len(a), b.shape[1]), (len(a), 0)
    return a, b.view(-1, len(held.of_D), b.shape[1]), (held.groups, held.first)


def _row(e: Tensor, Q: int, rows: tuple[int, int]) -> Tensor:
    """Row c of each e, as BlockSizes::row in csrc/core/operators.h."""
    groups, first = rows
    return e // Q * groups + e % Q + first


def _ends(a: Tensor, lam: Tensor, Q: int, rows: tuple[int, int]) -> Tensor:
    """The first e of each chunk of d, and the end of the last: BlockSizes::before."""
    groups, first = rows
    c = torch.arange(len(a) + 1, device=a.device) * (lam.numel() // len(a))
    behind = (c - first).clamp(min=0)
    return behind // groups * Q + (behind % groups).clamp(max=Q)


def _scaled(a: Tensor, lam: Tensor, gam: Tensor, dtype: torch.dtype, factor: float = 1) -> Tensor:
    """factor * A' by blocks (G, K / G, d / G)."""
    groups, q, width = a.shape
    wide = torch.promote_types(torch.promote_types(lam.dtype, gam.dtype), torch.float32)
    left = (factor * lam.to(wide)).view(groups, q, -1, 1)
    g = gam.to(wide).view(-1, groups, width).transpose(0, 1).unsqueeze(1)
    return (left * a.unsqueeze(2) * g).to(dtype).flatten(1, 2)


def _contract(grad: Tensor, a: Tensor, lam: Tensor, gam: Tensor, scale: float):
    """(dlam, dgam) from the gradient (G, K / G, d / G) of A'."""
    groups, q, width = a.shape
    wide = torch.promote_types(torch.promote_types(lam.dtype, gam.dtype), torch.float32)
    signed = grad.view(groups, q, -1, width).to(wide) * a.unsqueeze(2) * scale
    g = gam.to(wide).view(-1, groups, width).transpose(0, 1).unsqueeze(1)
    dlam = (signed * g).sum(3).view(lam.shape)
    dgam = (signed * lam.to(wide).view(groups, q, -1, 1)).sum(1).transpose(0, 1)
    return dlam.to(lam.dtype), dgam.reshape(gam.shape).to(gam.dtype)


def _ranges(dtype: torch.dtype, gam: Tensor, b: Tensor) -> tuple[float, float]:
    """Powers of two that keep float16 in range, as `Range` in csrc/torch/block.cpp."""
    if dtype != torch.float16:
        return 1.0, 1.0
    gradient = 2.0 ** -math.ceil(math.log2(math.sqrt(b.shape[2])))
    return 2.0 ** (4 + round(math.log2(max(gam.shape)))), gradient


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, lam, gam, a, b, rows, scale, expand):
        factor, _ = _ranges(x.dtype, gam, b)
        A, B = _sides(a, b, lam, rows, _scaled(a, lam, gam, x.dtype, factor))
        first, second = (A, B) if expand else (B, A)
        y = second.up(first.down(x), scale / factor)
        return y if weight is None else F.linear(x, weight) + y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, lam, gam, ctx.a, ctx.b, ctx.rows, ctx.scale, ctx.expand = inputs
        ctx.save_for_backward(x, weight, lam, gam)

    @staticmethod
    def backward(ctx, dy):
        with _no_autocast(dy):
            return _Linear._backward(ctx, dy)

    @staticmethod
    def _backward(ctx, dy):
        x, weight, lam, gam = ctx.saved_tensors
        a, b, scale = ctx.a, ctx.b, ctx.scale
        factor, gradient = _ranges(x.dtype, gam, b)
        A, B = _sides(a, b, lam, ctx.rows, _scaled(a, lam, gam, x.dtype, factor))
        first, second = (A, B) if ctx.expand else (B, A)
        U = second.down(dy)
        dx = first.up(U, scale / factor)
        if weight is not None:
            dx = dx + dy @ weight
        inner, outer = (U, x) if ctx.expand else (first.down(x), dy)
        P = A.gradient(inner * gradient, outer)
        dlam, dgam = _contract(P, a, lam, gam, scale / gradient)
        dweight = dy.T @ x if ctx.needs_input_grad[1] else None
        return dx, dweight, dlam, dgam, None, None, None, None, None


def _sides(a: Tensor, b: Tensor, lam: Tensor, rows: tuple[int, int], scaled: Tensor):
    """The sides of A' and B, from all rows c of A' (chunks of d, K / G, d / G)."""
    B = _Side(b.transpose(0, 1), by_rows=False)
    if rows == (len(a), 0) and b.shape[1] == len(a):
        return _Side(scaled, by_rows=True), B
    return _PartOfA(a, b, lam, rows, scaled), B


class _Side:
    """One side of the adapter: its blocks (G, K / G, features / G)."""

    def __init__(self, blocks: Tensor, by_rows: bool) -> None:
        self.blocks, self.by_rows = blocks, by_rows  # by_rows: consecutive rows of V or U

    def rows_of(self, V: Tensor) -> Tensor:
        """The rows of V (K, T) by block: (G, K / G, T)."""
        groups = len(self.blocks)
        if self.by_rows:
            return V.unflatten(0, (groups, -1))
        return V.unflatten(0, (-1, groups)).transpose(0, 1)

    def chunks_of(self, x: Tensor) -> Tensor:
        """x (T, features) by block: (G, T, features / G)."""
        return x.unflatten(1, (len(self.blocks), -1)).transpose(0, 1)

    def together(self, V: Tensor) -> Tensor:
        """The inverse of `rows_of`."""
        return (V if self.by_rows else V.transpose(0, 1)).flatten(0, 1)

    def down(self, x: Tensor) -> Tensor:
        """V (K, T) = blocks x^T."""
        return self.together(self.blocks @ self.chunks_of(x).transpose(1, 2))

    def up(self, V: Tensor, scale: float) -> Tensor:
        """scale * V^T blocks, (T, features); float16 may not hold the unscaled product."""
        zero, rows = V.new_zeros(1, 1, 1), self.rows_of(V).transpose(1, 2)
        chunks = torch.baddbmm(zero, rows, self.blocks, beta=0, alpha=scale)
        return chunks.transpose(0, 1).flatten(1)

    def gradient(self, V: Tensor, x: Tensor) -> Tensor:
        """The gradient of the blocks."""
        return self.rows_of(V) @ self.chunks_of(x)


class _PartOfA(_Side):
    """A' of a slice: its blocks have the rows e, padded because their counts may differ."""

    def __init__(self, a: Tensor, b: Tensor, lam: Tensor, rows, scaled: Tensor) -> None:
        cycles, Q, _ = b.shape
        ends = _ends(a, lam, Q, rows).unsqueeze(-1)
        cycles_of, rest = divmod(scaled.shape[1], rows[0])
        most = cycles_of * Q + min(rest, Q)
        e = torch.arange(most, device=a.device) + ends[:-1]
        inside = e < ends[1:]
        # Entries past the end of a block read zeros and write to a row that is never read.
        self.count, self.shape = cycles * Q, scaled.shape
        self.e = e.where(inside, self.count)
        self.c = _row(e, Q, rows).where(inside, self.shape[0] * self.shape[1])
        super().__init__(_with_zero(scaled.flatten(0, 1))[self.c], by_rows=True)

    def rows_of(self, V: Tensor) -> Tensor:
        return _with_zero(V)[self.e]

    def together(self, V: Tensor) -> Tensor:
        return _scattered(self.e, V, self.count)

    def gradient(self, V: Tensor, x: Tensor) -> Tensor:
        return _scattered(self.c, super().gradient(V, x), self.shape[0] * self.shape[1]).view(
            self.shape
        )


def _with_zero(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def _scattered(to: Tensor, rows: Tensor, count: int) -> Tensor:
    """(count, ..) with `rows` at `to`, zeros elsewhere; row `count` is dropped."""
    out = rows.new_zeros(count + 1, rows.shape[-1])
    return out.index_copy(0, to.flatten(), rows.flatten(0, 1))[:-1]
