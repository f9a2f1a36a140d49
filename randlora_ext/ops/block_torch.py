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
    a, b = _blocks(basis, x)
    flat = x.reshape(-1, x.shape[-1])
    with _no_autocast(x):
        y = _Linear.apply(flat, weight, lam, gam, a, b, scaling * basis.scale, basis.expand)
        y = y.view(*x.shape[:-1], basis.out_features)
        return y if bias is None else y + bias


def delta_weight(basis: TernaryBasis, lam: Tensor, gam: Tensor, scaling: float) -> Tensor:
    """As `functional.delta_weight`; summed in float32 or better."""
    _check_diagonals(basis, lam, gam)
    a, b = _blocks(basis, lam.float() if lam.dtype.itemsize < 4 else lam)
    scaled = _scaled(a, lam, gam, b.dtype)
    # The rows c that chunk h of d and chunk g of D have in common, padded to equally many.
    groups, rows = len(scaled), scaled.shape[1]
    c = torch.arange(groups * (rows // groups + 2) * groups, device=lam.device)
    c = c.view(groups, -1, groups) % (c.numel() // groups)
    h = torch.arange(groups, device=lam.device).view(-1, 1, 1)
    c = c + h * rows // groups * groups
    common = ((c >= h * rows) & (c < (h + 1) * rows)).unsqueeze(-1)
    c = c.clamp(max=groups * rows - 1)
    left, right = b[c] * common, scaled.flatten(0, 1)[c] * common
    with _no_autocast(lam):
        delta = torch.einsum("hmgo,hmgk->gohk", left, right).flatten(2).flatten(0, 1)
    delta = (delta * (scaling * basis.scale)).to(lam.dtype)
    return delta if basis.expand else delta.T


def _check(basis, x, weight, bias, lam, gam) -> None:
    """What the operators check, of which plain torch would broadcast or view much."""
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


def _blocks(basis: TernaryBasis, like: Tensor) -> tuple[Tensor, Tensor]:
    """Signs of A (G, q, d / G), and B (K, D / G) in the dtype of `like`."""
    a = basis.packed(like.device)[0]
    return a.view(basis.d // a.shape[1], -1, a.shape[1]), basis.dense_b(like.device, like.dtype)


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
    gradient = 2.0 ** -math.ceil(math.log2(math.sqrt(b.shape[1])))
    return 2.0 ** (4 + round(math.log2(max(gam.shape)))), gradient


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, lam, gam, a, b, scale, expand):
        factor, _ = _ranges(x.dtype, gam, b)
        A = _Side(_scaled(a, lam, gam, x.dtype, factor), by_rows=True)
        B = _Side(b.view(-1, len(a), b.shape[1]).transpose(0, 1), by_rows=False)
        first, second = (A, B) if expand else (B, A)
        y = second.up(first.down(x), scale / factor)
        return y if weight is None else F.linear(x, weight) + y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, lam, gam, ctx.a, ctx.b, ctx.scale, ctx.expand = inputs
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
        A = _Side(_scaled(a, lam, gam, x.dtype, factor), by_rows=True)
        B = _Side(b.view(-1, len(a), b.shape[1]).transpose(0, 1), by_rows=False)
        first, second = (A, B) if ctx.expand else (B, A)
        U = second.down(dy)
        dx = first.up(U, scale / factor)
        if weight is not None:
            dx = dx + dy @ weight
        inner, outer = (U, x) if ctx.expand else (first.down(x), dy)
        P = A.rows_of(inner * gradient) @ A.chunks_of(outer)
        dlam, dgam = _contract(P, a, lam, gam, scale / gradient)
        dweight = dy.T @ x if ctx.needs_input_grad[1] else None
        return dx, dweight, dlam, dgam, None, None, None, None


class _Side:
    """One side of the adapter: its blocks (G, K / G, features / G)."""

    def __init__(self, blocks: Tensor, by_rows: bool) -> None:
        self.blocks, self.by_rows = blocks, by_rows  # by_rows: consecutive rows c of V or U

    def rows_of(self, V: Tensor) -> Tensor:
        """The rows of V (K, T) by block: (G, K / G, T)."""
        groups = len(self.blocks)
        if self.by_rows:
            return V.unflatten(0, (groups, -1))
        return V.unflatten(0, (-1, groups)).transpose(0, 1)

    def chunks_of(self, x: Tensor) -> Tensor:
        """x (T, features) by block: (G, T, features / G)."""
        return x.unflatten(1, (len(self.blocks), -1)).transpose(0, 1)

    def down(self, x: Tensor) -> Tensor:
        """V (K, T) = blocks x^T."""
        V = self.blocks @ self.chunks_of(x).transpose(1, 2)
        return (V if self.by_rows else V.transpose(0, 1)).flatten(0, 1)

    def up(self, V: Tensor, scale: float) -> Tensor:
        """scale * V^T blocks, (T, features); float16 may not hold the unscaled product."""
        zero, rows = V.new_zeros(1, 1, 1), self.rows_of(V).transpose(1, 2)
        chunks = torch.baddbmm(zero, rows, self.blocks, beta=0, alpha=scale)
        return chunks.transpose(0, 1).flatten(1)
