"""The operators on Hadamard bases, csrc/torch/hadamard: shapes and gradients.

    ``y = x W^T + bias + scale * x dW^T``,  ``dW = B (lambda * A * gamma)`` or its transpose
    ``A[j, k] = a_signs[k] H[j, m]`` with the class ``m = k // n`` of column k
    ``B[o, c] = row_signs[o] H[o, c] col_signs[c]``, c = j * n + i

H is Sylvester's Hadamard matrix. An adapter's input scale multiplies the signs of the input side:
a_signs if that is d, else row_signs. Devices without our kernels, cards that these were not built
for, and cards with too little shared memory for the sizes take the same steps in plain torch.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..basis import Basis
from ..basis.hadamard import sylvester
from ..basis.packed import PackedSigns
from ..devices import has_cuda_kernels, has_kernels
from .registration import Operator, entry, fake, gradients, linear_entry, plain

_ops = torch.ops.randlora


def basis_arguments(
    basis: Basis,
    device: torch.device | str,
    scaling: float = 1.0,
    dtype: torch.dtype | None = None,
    input_scale: Tensor | None = None,
) -> dict[str, Any]:
    """The operators' arguments that describe the bases, in their order."""
    packed = basis.packed(device)
    assert isinstance(packed, PackedSigns)
    a_signs, row_signs = packed.a_signs, packed.row_signs
    if input_scale is not None:  # (in,), or (experts, in)
        if basis.expand:
            a_signs = a_signs * input_scale
        else:
            row_signs = row_signs * input_scale
    return {
        "a_signs": a_signs,
        "row_signs": row_signs,
        "col_signs": packed.col_signs,
        "expand": basis.expand,
        "scale": float(scaling),
    }


linear = linear_entry("hadamard_linear", lambda row_signs, **_: row_signs.shape[0])


class Weight(Operator):
    """Of W + dW; rounding counts as the identity."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, lam, gam, *ctx.basis = inputs
        ctx.save_for_backward(lam, gam)

    @staticmethod
    def backward(ctx, grad):
        lam, gam = ctx.saved_tensors
        a_signs, row_signs, col_signs, expand, scale = ctx.basis
        of_weight = grad if ctx.needs_input_grad[0] else None
        if grad.mT.is_contiguous():  # as the experts of transformers make it; a copy is a stack
            grad, expand = grad.mT, not expand
        op = _ops.hadamard_weight_backward.default
        diagonals = gradients(op, grad, lam, gam, a_signs, row_signs, col_signs, expand, scale)
        return of_weight, *diagonals, *[None] * len(ctx.basis)


@fake
def hadamard_weight(weight, lam, a_signs, row_signs, expand, **_):
    D, d = row_signs.shape[-1], a_signs.shape[-1]
    sizes = *lam.shape[:-2], *((D, d) if expand else (d, D))
    return (lam if weight is None else weight).new_empty(sizes)


weight = entry("hadamard_weight", Weight)


def delta(
    basis: Basis,
    lam: Tensor,
    gam: Tensor,
    scaling: float,
    input_scale: Tensor | None = None,
) -> Tensor:
    return weight(None, lam, gam, **basis_arguments(basis, lam.device, scaling, None, input_scale))


def what_computes(basis: Basis, device: torch.device, dtype: torch.dtype, kernels: str) -> str:
    if has_cuda_kernels(device):  # as far as the card's shared memory is large enough
        sizes = basis.D, basis.d, basis.r, basis.n
        fits = _C.hadamard_fits(*sizes, dtype == torch.float64, device.index or 0)
        return kernels if fits else "plain torch"
    return kernels if has_kernels(device) else "plain torch"


# ---- plain torch ---------------------------------------------------------------------------


def _plain_linear(x, weight, bias, lam, gam, a_signs, row_signs, col_signs, expand, scale):
    flat = x.reshape(-1, x.shape[-1])
    y, *_ = _plain_product(flat, None, expand, lam, gam, a_signs, row_signs, col_signs, scale)
    y = y if weight is None else y + F.linear(flat, weight, bias)
    return y.to(x.dtype).contiguous().view(*x.shape[:-1], y.shape[1])


def _plain_linear_backward(
    dy, x, weight, lam, gam, a_signs, row_signs, col_signs, expand, scale, need_dx, need_dlam_dgam
):
    flat = dy.reshape(-1, dy.shape[-1])
    other = x.reshape(-1, x.shape[-1]) if need_dlam_dgam else None
    dx, dlam, dgam = _plain_product(
        flat, other, not expand, lam, gam, a_signs, row_signs, col_signs, scale
    )
    if not need_dx:
        return None, dlam, dgam
    dx = dx if weight is None else dx + flat @ weight
    return dx.to(x.dtype).contiguous().view(x.shape), dlam, dgam


def _plain_product(given, other, up, lam, gam, a_signs, row_signs, col_signs, scale):
    """As HadamardProduct of csrc/torch: the product of `given` with dW, `up` from (T, d) to
    (T, D) or down, and the gradients of lambda and gamma if `other` has the other size.
    """
    wide = torch.promote_types(given.dtype, torch.float32)
    # As ClassOf in csrc/core/hadamard.h: the range of float16 is too small.
    class_dtype = wide if given.dtype == torch.float16 else given.dtype
    (r, n), d, D = lam.shape, len(a_signs), len(row_signs)
    classes = -(-d // n)
    N = 1 << (r * n - 1).bit_length()
    j, m, o = (torch.arange(size, device=a_signs.device) for size in (r, classes, D))
    H = sylvester(j, m).to(wide)
    row_in_transform = o % N
    a_signs, row_signs, col_signs = (t.to(wide) for t in (a_signs, row_signs, col_signs))

    def by_class(t: Tensor) -> Tensor:
        """(T, d) as (T, classes, n); columns that are missing are zero."""
        return F.pad(t.to(class_dtype), (0, classes * n - d)).unflatten(1, (classes, n))

    def by_column(t: Tensor) -> Tensor:
        """The inverse, in the compute type."""
        return F.pad(t.flatten(1), (0, d - classes * n)).to(wide)

    # Lambda and gamma have these factors, and so their gradients.
    lam_factor, gam_factor = col_signs.view(r, n) * scale, a_signs
    factors = lam.to(wide) * lam_factor
    blocks = by_class(gam.to(wide) * gam_factor)
    small, large = (given, other) if up else (other, given)
    if small is not None:
        z = torch.einsum("tmk,imk->tmi", by_class(small), blocks).to(wide)
        z = torch.einsum("jm,tmi->tji", H, z)
    if large is not None:
        sums = row_signs.new_zeros(len(large), N).index_add(1, row_in_transform, large * row_signs)
        u = _transform(sums)[:, : r * n].view(-1, r, n)
        w = torch.einsum("jm,tji->tmi", H, u * factors).to(class_dtype)
    if up:
        v = F.pad((z * factors).flatten(1), (0, N - r * n))
        product = _transform(v)[:, row_in_transform] * row_signs
    else:
        product = by_column(torch.einsum("tmi,imk->tmk", w, blocks))
    if other is None:
        return product, None, None
    P = torch.einsum("tmi,tmk->imk", w, by_class(small))
    dlam = (u * z).sum(0) * lam_factor
    dgam = by_column(P) * gam_factor
    return product, dlam.to(lam.dtype), dgam.to(gam.dtype)


def _transform(v: Tensor) -> Tensor:
    """v (T, N) @ H, as two small products."""
    N = v.shape[1]
    columns = 1 << (N.bit_length() - 1) // 2
    rows = N // columns
    i, k = torch.arange(rows, device=v.device), torch.arange(columns, device=v.device)
    left, right = sylvester(i, i).to(v.dtype), sylvester(k, k).to(v.dtype)
    return (left @ v.unflatten(1, (rows, columns)) @ right).flatten(1)


def _by_expert(lam: Tensor, *tensors: Tensor | None) -> Iterator[tuple]:
    """Every expert's part of these tensors; None and vectors are for all."""
    parts = (itertools.repeat(t, len(lam)) if t is None or t.dim() == 1 else t for t in tensors)
    return zip(*parts, strict=True)


def _plain_weight(weight, lam, gam, a_signs, row_signs, col_signs, expand, scale):
    if lam.dim() == 3:
        parts = _by_expert(lam, weight, lam, gam, a_signs, row_signs)
        return torch.stack([_plain_weight(*part, col_signs, expand, scale) for part in parts])
    like = lam if weight is None else weight
    # Row k is column k of B (lambda * A * gamma).
    x = _identity(like, len(a_signs))
    delta = _plain_linear(
        x, None, None, lam, gam, a_signs, row_signs, col_signs, expand=True, scale=scale
    )
    delta = delta.T if expand else delta
    total = delta if weight is None else weight.to(delta) + delta
    return total.to(like.dtype).contiguous()


def _plain_weight_backward(grad, lam, gam, a_signs, row_signs, col_signs, expand, scale):
    if lam.dim() == 3:
        parts = _by_expert(lam, grad, lam, gam, a_signs, row_signs)
        results = [_plain_weight_backward(*part, col_signs, expand, scale) for part in parts]
        dlams, dgams = zip(*results, strict=True)
        return torch.stack(dlams), torch.stack(dgams)
    x = _identity(grad, len(a_signs))
    dy = (grad.T if expand else grad).to(x)
    _, dlam, dgam = _plain_linear_backward(
        dy,
        x,
        None,
        lam,
        gam,
        a_signs,
        row_signs,
        col_signs,
        expand=True,
        scale=scale,
        need_dx=False,
        need_dlam_dgam=True,
    )
    return dlam, dgam


def _identity(like: Tensor, d: int) -> Tensor:
    """x (d, d) in the compute type, for which y is dW or its transpose."""
    return torch.eye(d, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


plain("hadamard_linear", _plain_linear)
plain("hadamard_linear_backward", _plain_linear_backward)
plain("hadamard_weight", _plain_weight)
plain("hadamard_weight_backward", _plain_weight_backward)
