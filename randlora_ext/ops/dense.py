"""Dense bases, PEFT's default, in plain torch: the products are GEMMs of any A and B. A' =
lambda * A * gamma (`scaled`) has our kernels.

In float16, powers of two keep A', x A'^T and the gradient of A' in range: |lambda gamma A| may be
up to about 65504 / d, |x A'^T| up to 65504 / sqrt(d), and each element of dy B must fit, as with
LoRA.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basis import Basis
from ..basis.packed import DensePair
from ..checks import check_diagonals, check_dimensions, check_linear, check_operand
from ..reference import scaled_basis_reference
from .registration import Operator, entry, fake, gradients, linear_entry, plain

_ops = torch.ops.randlora


class ScaledBasis(Operator):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        op = _ops.scaled_basis_backward.default
        return None, *gradients(op, grad, *ctx.saved_tensors)


scaled = entry("scaled_basis", ScaledBasis)


@fake
def scaled_basis(A, lam, **_):
    return A.new_empty((lam.shape[0] * lam.shape[1], A.shape[1]))


def _plain_scaled_basis(A: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
    wide = torch.promote_types(A.dtype, torch.float32)
    return scaled_basis_reference(A.to(wide), lam.to(wide), gam.to(wide)).to(A.dtype)


def _plain_scaled_basis_backward(grad, A, lam, gam) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(grad.dtype, torch.float32)
    by_rank = grad.to(wide).unflatten(0, lam.shape) * A.to(wide)[:, None]  # (r, n, d)
    dlam = torch.einsum("jik,ik->ji", by_rank, gam.to(wide))
    dgam = torch.einsum("jik,ji->ik", by_rank, lam.to(wide))
    return dlam.to(lam.dtype), dgam.to(gam.dtype)


plain("scaled_basis", _plain_scaled_basis)
plain("scaled_basis_backward", _plain_scaled_basis_backward)


def basis_arguments(
    basis: Basis,
    device: torch.device | str,
    scaling: float = 1.0,
    dtype: torch.dtype | None = None,
    input_scale: None = None,
) -> dict[str, Any]:
    """The operators' arguments that describe the bases, in their order: A and B in `dtype`, which
    is that of x, `expand` and `scale`."""
    assert input_scale is None  # goes with Hadamard bases
    packed = basis.packed(device, dtype)
    assert isinstance(packed, DensePair)
    return {"A": packed.A, "B": packed.B, "expand": basis.expand, "scale": float(scaling)}


def delta(
    basis: Basis,
    lam: Tensor,
    gam: Tensor,
    scaling: float,
    input_scale: None = None,
) -> Tensor:
    """dW by dense matrices of bases of any kind; differentiable by torch."""
    assert input_scale is None  # goes with Hadamard bases
    wide = torch.promote_types(lam.dtype, torch.float32)
    # torch.autocast does not know "meta".
    device_type = "cpu" if lam.is_meta else lam.device.type
    A, B = basis.dense(lam.device, wide)
    with torch.autocast(device_type, enabled=False):
        product = (scaling * B) @ scaled(A, lam.to(wide), gam.to(wide))
    return (product if basis.expand else product.T).to(lam.dtype)


class _DenseProducts:
    """The products of one call, on x and dy as matrices (T, features)."""

    def __init__(self, x, weight, bias, lam, gam, A, B, expand, scale, dy=None):
        check_dimensions("A", A, "r, d")
        check_dimensions("B", B, "D, K")
        (r, d), (D, K) = A.shape, B.shape
        check_diagonals(lam, gam, d)
        check_linear(x, weight, bias, lam, (d, D) if expand else (D, d), dy)
        check_operand("lam", lam, (r, lam.shape[1]), lam.device)
        check_operand("A", A, (r, d), lam.device)
        check_operand("B", B, (D, lam.numel()), lam.device, x.dtype)
        self.lam, self.gam, self.A, self.B = lam, gam, A.to(x.dtype), B
        self.weight, self.scale, self.expand = weight, scale, expand
        self.x = x.reshape(-1, x.shape[-1])
        # Whether W + dW is formed, not dW alone: 16 bits would lose small changes.
        self.adds_to_weight = weight is not None and x.dtype.itemsize > 2
        # dW is formed if that saves multiply-adds: large GEMMs take the time of 2 to 2.7 T for the
        # 3 T that forming it counts. Below 256 tokens the overhead of more calls hides the saving.
        T = len(self.x)
        in_factors = 3 * K / D + (2 if expand else 3) * K / d
        in_delta = 1 if self.adds_to_weight else 3
        self.forms_delta = T >= 256 and T * (in_factors - in_delta) >= 2.5 * K
        # Powers of two: of A', of x A'^T (a sum of d terms, of which small ones should not be
        # subnormal, nor large ones infinite), and of the gradient of A'.
        self.scaled_factor = self.inner_factor = self.gradient_factor = 1.0
        if x.dtype == torch.float16:
            self.scaled_factor = 2.0 ** round(math.log2(max(gam.shape)))
            self.inner_factor = self.scaled_factor * 2.0 ** -math.ceil(math.log2(d) / 2)
            self.gradient_factor = 2.0 ** -math.ceil(math.log2(D) / 2)

    def scaled(self) -> Tensor:
        """scaled_factor * A' (K, d)."""
        wide = self.lam.to(torch.promote_types(self.lam.dtype, torch.float32))
        return _ops.scaled_basis(self.A, wide * self.scaled_factor, self.gam)

    def delta(self) -> Tensor:
        """dW, or W + dW if it adds to the weight: (out, in)."""
        left, right = self.B, self.scaled()
        if not self.expand:
            left, right = right.T, self.B.T
        base = self.weight if self.adds_to_weight else None
        return _product(left, right, self.scale / self.scaled_factor, base)

    def oriented(self, weight: Tensor, up: bool) -> Tensor:
        """A matrix (out, in) as F.linear takes it for a product `up` or down."""
        return weight if up == self.expand else weight.T

    def times(
        self, v: Tensor, up: bool, bias: Tensor | None = None, U: Tensor | None = None
    ) -> Tensor:
        """The product of v and W + dW, `up` from d features to D or down, so y of x or dx of dy.
        U = v B if that is known."""
        if self.forms_delta and self.adds_to_weight:
            return F.linear(v, self.oriented(self.delta(), up), bias)
        added = None
        if self.weight is not None:
            added = F.linear(v, self.oriented(self.weight, up), bias)
        if self.forms_delta:
            return _product(v, self.oriented(self.delta(), up).T, 1.0, added)
        if up:
            V = _product(v, self.scaled().T, self.inner_factor / self.scaled_factor)
            return _product(V, self.B.T, self.scale / self.inner_factor, added)
        U = v @ self.B if U is None else U
        return _product(U, self.scaled(), self.scale / self.scaled_factor, added)

    def of_diagonals(self, dy: Tensor, U: Tensor | None) -> tuple[Tensor, Tensor]:
        """dlam and dgam from the gradient of A' (K, d): from U, or from dy^T x if that takes fewer
        operations."""
        small, large = (self.x, dy) if self.expand else (dy, self.x)
        T, (D, K), d = len(small), self.B.shape, small.shape[1]
        if self.forms_delta and T * K * (D + d) > (T + K) * D * d:
            P = self.B.T @ _product(large.T, small, self.gradient_factor)
        else:
            U = large @ self.B if U is None else U
            P = _product(U.T, small, self.gradient_factor)
        dlam, dgam = _ops.scaled_basis_backward(P, self.A, self.lam, self.gam)
        scale = self.scale / self.gradient_factor
        return dlam * scale, dgam * scale


def _product(left: Tensor, right: Tensor, factor: float, added: Tensor | None = None) -> Tensor:
    """added + factor * left @ right, rounded once."""
    if added is None:
        return torch.addmm(left.new_zeros(1, 1), left, right, beta=0, alpha=factor)
    return torch.addmm(added, left, right, alpha=factor)


def _dense_linear(x, weight, bias, lam, gam, A, B, expand, scale):
    products = _DenseProducts(x, weight, bias, lam, gam, A, B, expand, scale)
    y = products.times(products.x, expand, bias)
    return y.view(*x.shape[:-1], y.shape[1])


def _dense_linear_backward(dy, x, weight, lam, gam, A, B, expand, scale, need_dx, need_dlam_dgam):
    products = _DenseProducts(x, weight, None, lam, gam, A, B, expand, scale, dy)
    flat = dy.reshape(-1, dy.shape[-1])
    # Both gradients need it.
    U = flat @ B if expand and not products.forms_delta else None
    dx, dlam, dgam = None, None, None
    if need_dx:
        dx = products.times(flat, not expand, U=U).view(x.shape)
    if need_dlam_dgam:
        dlam, dgam = products.of_diagonals(flat, U)
    return dx, dlam, dgam


_BASIS = "Tensor lam, Tensor gam, Tensor A, Tensor B, bool expand, float scale"
torch.library.define(
    "randlora::dense_linear", f"(Tensor x, Tensor? weight, Tensor? bias, {_BASIS}) -> Tensor"
)
torch.library.define(
    "randlora::dense_linear_backward",
    f"(Tensor dy, Tensor x, Tensor? weight, {_BASIS}, bool need_dx, bool need_dlam_dgam) -> "
    "(Tensor?, Tensor?, Tensor?)",
)
torch.library.impl("randlora::dense_linear", "default", _dense_linear)
torch.library.impl("randlora::dense_linear_backward", "default", _dense_linear_backward)


linear = linear_entry("dense_linear", lambda B, **_: B.shape[0])


def what_computes(basis: Basis, device: torch.device, dtype: torch.dtype, kernels: str) -> str:
    return "torch's GEMMs"
