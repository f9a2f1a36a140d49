"""Dense bases, PEFT's default, in plain torch: the products are GEMMs of any A and B. A' =
lambda * A * gamma (`scaled`) and `add_rounded` have our kernels.

Forward keeps x, weight, lambda and gamma; backward computes everything else again. In float16,
powers of two keep A', x A'^T and the gradient of A' in range: |lambda gamma A| may be up to about
65504 / d, |x A'^T| up to 65504 / sqrt(d), and each element of dy B must fit, as with LoRA.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basis import TernaryBasis
from ..reference import scaled_basis_reference
from .path import PATHS
from .registration import Operator, call_kernel, entry, fake, gradients, register_linear

_ops = torch.ops.randlora


class ScaledBasis(Operator):
    @staticmethod
    def forward(A, lam, gam):
        return call_kernel(_ops.scaled_basis.default, A, lam, gam)

    @staticmethod
    def setup_context(ctx, inputs, output):
        A, lam, gam = inputs
        ctx.save_for_backward(A, lam, gam)

    @staticmethod
    def backward(ctx, grad):
        A, lam, gam = ctx.saved_tensors
        dlam, dgam = gradients(_ops.scaled_basis_backward.default, grad, A, lam, gam)
        return None, dlam, dgam


scaled = entry("scaled_basis", ScaledBasis)


@fake
def scaled_basis(A, lam, gam):
    return A.new_empty((lam.shape[0] * lam.shape[1], A.shape[1]))


@fake
def scaled_basis_backward(grad, A, lam, gam):
    return lam.new_empty(lam.shape), gam.new_empty(gam.shape)


def _plain_scaled_basis(A: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
    wide = torch.promote_types(A.dtype, torch.float32)
    return scaled_basis_reference(A.to(wide), lam.to(wide), gam.to(wide)).to(A.dtype)


def _plain_scaled_basis_backward(grad, A, lam, gam) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(grad.dtype, torch.float32)
    by_rank = grad.to(wide).unflatten(0, lam.shape) * A.to(wide)[:, None]  # (r, n, d)
    dlam = torch.einsum("jik,ik->ji", by_rank, gam.to(wide))
    dgam = torch.einsum("jik,ji->ik", by_rank, lam.to(wide))
    return dlam.to(lam.dtype), dgam.to(gam.dtype)


torch.library.impl("randlora::scaled_basis", "default", _plain_scaled_basis)
torch.library.impl("randlora::scaled_basis_backward", "default", _plain_scaled_basis_backward)


@fake
def add_rounded(weight, delta, rounding_seed):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def operands(
    basis: TernaryBasis, device: torch.device, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float, bool]:
    """The operators' arguments that describe the bases."""
    A, B = basis.dense_a(device, dtype), basis.dense_b(device, dtype)
    return A, B, float(scaling), basis.expand


def delta(basis: TernaryBasis, lam: Tensor, gam: Tensor, scaling: float) -> Tensor:
    """As `functional.delta_weight`; differentiable by torch."""
    wide, kind = torch.promote_types(lam.dtype, torch.float32), lam.device.type
    A, B, *_ = operands(basis, lam.device, scaling, wide)
    with torch.autocast(kind if kind != "meta" else "cpu", enabled=False):
        product = (scaling * B) @ scaled(A, lam.to(wide), gam.to(wide))
    return (product if basis.expand else product.T).to(lam.dtype)


def check_plain(x, weight, bias, lam, gam, r, d, D, expand, merged, dy=None) -> None:
    """Checks for plain torch what csrc/torch checks for the kernels; torch would broadcast."""
    if weight is None and (bias is not None or merged):
        what = "merge" if bias is None else "bias"
        raise RuntimeError(
            f"randlora: {what} was given without a weight; add it to the base output"
        )
    n = lam.shape[-1] if lam.dim() else 0
    ends = (d, D) if expand else (D, d)
    for name, t, shape in (
        ("lam", lam, (r, n)),
        ("gam", gam, (n, d)),
        ("x", x, (*x.shape[:-1], ends[0])),
        ("weight", weight, ends[::-1]),
        ("bias", bias, ends[1:]),
        ("dy", dy, (*x.shape[:-1], ends[1])),
    ):
        if t is None:
            continue
        same = t.device == x.device and (name in ("lam", "gam") or t.dtype == x.dtype)
        if not same or not t.is_floating_point() or tuple(t.shape) != shape:
            raise RuntimeError(
                f"randlora: {name} must be a floating tensor {shape} on {x.device}, in the dtype "
                f"of x {tuple(x.shape)} {x.dtype} unless it is lam or gam, got {tuple(t.shape)} "
                f"{t.dtype} on {t.device}"
            )


class _Products:
    """The products of one call. A factor of A' or of its gradient is a power of two."""

    def __init__(self, x, weight, bias, lam, gam, A, B, scale, expand, path, dy=None):
        if path not in PATHS:
            raise RuntimeError(f"randlora: path must be one of {PATHS}, got {path!r}")
        sizes = len(A), A.shape[1], len(B)
        check_plain(x, weight, bias, lam, gam, *sizes, expand, path == "merged", dy)
        dtype = x.dtype
        self.lam, self.gam, self.B, self.scale, self.expand = lam, gam, B, scale, expand
        self.A, self.dtype = A.to(dtype), dtype
        half = dtype == torch.float16
        self.factor = 2.0 ** round(math.log2(max(gam.shape))) if half else 1.0
        # Of x A'^T, a sum of d terms: small ones should not be subnormal, nor large ones infinite.
        self.inner = self.factor * 2.0 ** -math.ceil(math.log2(A.shape[1]) / 2) if half else 1.0
        self.gradient = 2.0 ** -math.ceil(math.log2(len(B)) / 2) if half else 1.0

    def scaled(self) -> Tensor:
        """factor * A' (K, d)."""
        wide = self.lam.to(torch.promote_types(self.lam.dtype, torch.float32))
        return _ops.scaled_basis(self.A, wide * self.factor, self.gam)

    def contract(self, P: Tensor) -> tuple[Tensor, Tensor]:
        """(dlam, dgam) from gradient * P, the gradient of A' without the scale."""
        op = _ops.scaled_basis_backward.default
        dlam, dgam = op(P, self.A, self.lam, self.gam)
        scale = self.scale / self.gradient
        return dlam * scale, dgam * scale

    def formed(self, base: Tensor | None) -> Tensor:
        """base + dW, or dW: (out, in)."""
        left, right = self.B, self.scaled()
        if not self.expand:
            left, right = right.T, self.B.T
        return _product(left, right, self.scale / self.factor, base)


def _product(left: Tensor, right: Tensor, alpha: float, added: Tensor | None = None) -> Tensor:
    """added + alpha * left @ right, rounded once."""
    if added is None:
        added, beta = left.new_zeros(1, 1), 0
    else:
        beta = 1
    return torch.addmm(added, left, right, beta=beta, alpha=alpha)


def _dense_linear(x, weight, bias, lam, gam, A, B, scale, expand, path):
    p = _Products(x, weight, bias, lam, gam, A, B, scale, expand, path)
    flat = x.reshape(-1, x.shape[-1])
    if path == "merged":
        y = F.linear(flat, p.formed(weight), bias)
    else:
        y = None if weight is None else F.linear(flat, weight, bias)
        if path == "delta":
            y = _product(flat, p.formed(None).T, 1.0, y)
        elif expand:
            V = _product(flat, p.scaled().T, p.inner / p.factor)
            y = _product(V, B.T, scale / p.inner, y)
        else:
            y = _product(flat @ B, p.scaled(), scale / p.factor, y)
    return y.view(*x.shape[:-1], y.shape[1])


def _dense_linear_backward(
    dy, x, weight, lam, gam, A, B, scale, expand, path, need_x, need_diagonals
):
    p = _Products(x, weight, None, lam, gam, A, B, scale, expand, path, dy)
    dx, dlam, dgam = x.new_empty(0), lam.new_empty(0), gam.new_empty(0)
    flat, dflat = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    factored = path == "factored"
    U = dflat @ B if expand and factored else None
    if need_x:
        if path == "merged":
            dx = dflat @ p.formed(weight)
        else:
            dx = None if weight is None else dflat @ weight
            if path == "delta":
                dx = _product(dflat, p.formed(None), 1.0, dx)
            elif expand:
                dx = _product(U, p.scaled(), scale / p.factor, dx)
            else:
                V = _product(dflat, p.scaled().T, p.inner / p.factor)
                dx = _product(V, B.T, scale / p.inner, dx)
        dx = dx.view(x.shape)
    if need_diagonals:
        dlam, dgam = p.contract(_gradient_of_scaled(flat, dflat, U, p, factored))
    return dx, dlam, dgam


def _gradient_of_scaled(x, dy, U, p: _Products, factored: bool) -> Tensor:
    """gradient * P (K, d): from U, or from dy^T x if that takes fewer operations."""
    small, large = (x, dy) if p.expand else (dy, x)
    T, (D, K), d = len(x), p.B.shape, small.shape[1]
    if not factored and T * K * (D + d) > (T + K) * D * d:
        return _product(p.B.T, _product(large.T, small, p.gradient), 1.0)
    U = large @ p.B if U is None else U
    return _product(U.T, small, p.gradient)


_BASES = "Tensor lam, Tensor gam, Tensor A, Tensor B, float scale, bool expand, str path"
torch.library.define(
    "randlora::dense_linear", f"(Tensor x, Tensor? weight, Tensor? bias, {_BASES}) -> Tensor"
)
torch.library.define(
    "randlora::dense_linear_backward",
    f"(Tensor dy, Tensor x, Tensor? weight, {_BASES}, bool need_x, bool need_diagonals) -> "
    "(Tensor, Tensor, Tensor)",
)
torch.library.impl("randlora::dense_linear", "default", _dense_linear)
torch.library.impl("randlora::dense_linear_backward", "default", _dense_linear_backward)
linear = register_linear(
    "dense_linear",
    lambda gam, A, B, scale, expand, path: B.shape[0] if expand else A.shape[1],
)
