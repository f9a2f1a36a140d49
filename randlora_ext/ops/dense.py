"""Dense bases, PEFT's default, in plain torch: the products are GEMMs of any A and B.

Forward keeps x, weight, lambda and gamma; backward computes everything else again. In float16,
powers of two keep A', x A'^T and the gradient of A' in range: |lambda gamma A| may be up to about
65504 / d, |x A'^T| up to 65504 / sqrt(d), and each element of dy B must fit, as with LoRA.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basis import TernaryBasis
from .basis_ops import scaled as scaled_basis
from .path import PATHS
from .registration import register_linear

_ops = torch.ops.randlora
_library = torch.library.Library("randlora", "FRAGMENT")  # registrations live as long as this


def operands(
    basis: TernaryBasis, device: torch.device, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float, bool]:
    """The operators' arguments that describe the bases, which may be Hadamard bases."""
    A, B = basis.dense_a(device, dtype), basis.dense_b(device, dtype)
    return A, B, float(scaling), basis.expand


def delta(basis: TernaryBasis, lam: Tensor, gam: Tensor, scaling: float) -> Tensor:
    """As `functional.delta_weight`; differentiable by torch."""
    wide, kind = torch.promote_types(lam.dtype, torch.float32), lam.device.type
    A, B, *_ = operands(basis, lam.device, scaling, wide)
    with torch.autocast(kind if kind != "meta" else "cpu", enabled=False):
        product = (scaling * B) @ scaled_basis(A, lam.to(wide), gam.to(wide))
    return (product if basis.expand else product.T).to(lam.dtype)


def _check(x, weight, bias, lam, gam, A, B, expand, path) -> None:
    """What csrc/torch checks for other bases; torch would broadcast or view much of it."""
    for name, value in (("x", x), ("lam", lam), ("gam", gam)):
        if not value.is_floating_point():
            raise ValueError(f"{name} must be a floating tensor, got {value.dtype}")
    if path not in PATHS:
        raise ValueError(f"path must be one of {PATHS}, got {path!r}")
    if weight is None and (bias is not None or path == "merged"):
        what = "bias" if bias is not None else "path 'merged'"
        raise ValueError(f"{what} was given without a weight; add it to the base output")
    d, D = A.shape[1], B.shape[0]
    n_in, n_out = (d, D) if expand else (D, d)
    for name, value, shape in (
        ("x", x, (*x.shape[:-1], n_in)),
        ("weight", weight, (n_out, n_in)),
        ("bias", bias, (n_out,)),
    ):
        if value is not None and (tuple(value.shape) != shape or value.dtype != x.dtype):
            raise ValueError(
                f"{name} must be {shape} in the dtype of x, {x.dtype}, got "
                f"{tuple(value.shape)} {value.dtype}"
            )
    for name, value in (("weight", weight), ("bias", bias), ("lam", lam), ("gam", gam)):
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device} but x on {x.device}")


class _Products:
    """The products of one call. A factor of A' or of its gradient is a power of two."""

    def __init__(self, lam, gam, A, B, scale, expand, dtype):
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
    _check(x, weight, bias, lam, gam, A, B, expand, path)
    p = _Products(lam, gam, A, B, scale, expand, x.dtype)
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
    _check(x, weight, None, lam, gam, A, B, expand, path)
    out = len(B) if expand else A.shape[1]
    if tuple(dy.shape) != (*x.shape[:-1], out) or dy.dtype != x.dtype:
        raise ValueError(f"dy is {tuple(dy.shape)} {dy.dtype}, which does not fit x and {out}")
    p = _Products(lam, gam, A, B, scale, expand, x.dtype)
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
_library.define(f"dense_linear(Tensor x, Tensor? weight, Tensor? bias, {_BASES}) -> Tensor")
_library.define(
    f"dense_linear_backward(Tensor dy, Tensor x, Tensor? weight, {_BASES}, bool need_x, "
    "bool need_diagonals) -> (Tensor, Tensor, Tensor)"
)
_library.impl("dense_linear", _dense_linear, "CompositeExplicitAutograd")
_library.impl("dense_linear_backward", _dense_linear_backward, "CompositeExplicitAutograd")
linear = register_linear(
    "dense_linear",
    lambda gam, A, B, scale, expand, path: B.shape[0] if expand else A.shape[1],
)
