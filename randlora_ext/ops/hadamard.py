"""The operators on Hadamard bases, csrc/torch/hadamard.cpp: shapes and gradients.

    ``y = x W^T + bias + scale * x dW^T``,  ``dW = B (lambda * A * gamma)`` or its transpose
    ``A[j, k] = s[k] H[j, m]`` with the class ``m = k // n`` of column k
    ``B[o, c] = row[o] H[o, c] col[c]``, c = j * n + i

H is Sylvester's Hadamard matrix; s, row and col are signs, times the adapter's input scale on the
input side. Devices without our kernels, and cards with too little shared memory for the sizes, take
the same steps in plain torch.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basis import Basis
from ..basis.hadamard import sylvester
from .dense import check_plain
from .registration import Operator, entry, fake, gradients, linear_entry

_ops = torch.ops.randlora


def operands(basis: Basis, device, scaling: float = 1.0, dtype=None) -> dict[str, Any]:
    """The operators' arguments that describe the bases, in their order."""
    s, row, col = basis.packed(device)
    return {"s": s, "row": row, "col": col, "expand": basis.expand, "scale": float(scaling)}


@fake
def hadamard_linear(x, weight, bias, lam, gam, s, row, col, expand, scale):
    return x.new_empty((*x.shape[:-1], (row if expand else s).shape[0]))


linear = linear_entry("hadamard_linear")


class Weight(Operator):
    """Of W + dW; rounding counts as the identity."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, lam, gam, *ctx.basis = inputs
        ctx.save_for_backward(lam, gam)

    @staticmethod
    def backward(ctx, grad):
        lam, gam = ctx.saved_tensors
        s, row, col, expand, scale = ctx.basis
        of_weight = grad if ctx.needs_input_grad[0] else None
        if grad.mT.is_contiguous():  # as the experts of transformers make it; a copy is a stack
            grad, expand = grad.mT, not expand
        op = _ops.hadamard_weight_backward.default
        diagonals = gradients(op, grad, lam, gam, s, row, col, expand, scale)
        return of_weight, *diagonals, *[None] * len(ctx.basis)


@fake
def hadamard_weight(weight, lam, gam, s, row, col, expand, scale):
    D, d = row.shape[-1], s.shape[-1]
    sizes = *lam.shape[:-2], *((D, d) if expand else (d, D))
    return (lam if weight is None else weight).new_empty(sizes)


@fake
def hadamard_weight_backward(grad, lam, gam, s, row, col, expand, scale):
    return lam.new_empty(lam.shape), gam.new_empty(gam.shape)


weight = entry("hadamard_weight", Weight)


# ---- plain torch ---------------------------------------------------------------------------


class _Plain:
    """The steps between x (T, d), its class products, and y (T, D). Checks what
    csrc/torch/hadamard.cpp checks."""

    def __init__(self, x, weight, bias, lam, gam, s, row, col, expand, scale, dy=None):
        self.d, self.D = len(s), len(row)
        r = len(lam) if lam.dim() else 0
        check_plain(x, weight, bias, lam, gam, r, self.d, self.D, expand, dy)
        self.r, self.n = lam.shape
        for name, t, count in (("s", s, self.d), ("row", row, self.D), ("col", col, lam.numel())):
            if tuple(t.shape) != (count,) or t.dtype != torch.float32:
                raise RuntimeError(
                    f"randlora: {name} must be ({count}) float32, got {tuple(t.shape)} {t.dtype}"
                )
        self.expand, self.scale = expand, scale
        self.wide = torch.promote_types(x.dtype, torch.float32)
        # As ClassOf in csrc/core/hadamard.h: the range of float16 is too small.
        self.of_classes = self.wide if x.dtype == torch.float16 else x.dtype
        self.classes = -(-self.d // self.n)
        self.N = 1 << (self.r * self.n - 1).bit_length()
        self.rows = torch.arange(self.D, device=row.device) % self.N
        self.s, self.row, self.col = (t.to(self.wide) for t in (s, row, col))
        self.lam = lam.to(self.wide) * self.col.view(self.r, self.n)
        self.blocks = self.by_class(gam.to(self.wide) * self.s).movedim(1, 0)  # (classes, n, n)

    def by_class(self, x: Tensor) -> Tensor:
        """(T, d) as (T, classes, n) in the class dtype; columns that are missing are zero."""
        missing = self.classes * self.n - self.d
        return F.pad(x.to(self.of_classes), (0, missing)).unflatten(-1, (self.classes, self.n))

    def columns(self, x: Tensor) -> Tensor:
        """The inverse of `by_class`, in the compute type."""
        return x.flatten(-2)[..., : self.d].to(self.wide)

    def mix(self, z: Tensor, to_classes: bool = False) -> Tensor:
        """Between the rank indices (T, r, n) and the classes (T, classes, n)."""
        j, m = (torch.arange(count, device=z.device) for count in (self.r, self.classes))
        H = sylvester(j, m).to(self.wide)
        return torch.einsum("jm,tji->tmi" if to_classes else "jm,tmi->tji", H, z)

    def transform(self, v: Tensor) -> Tensor:
        """v (T, N) @ H, as two small products."""
        low = 1 << (self.N.bit_length() - 1) // 2
        one, other = (torch.arange(size, device=v.device) for size in (self.N // low, low))
        left, right = (sylvester(i, i).to(v.dtype) for i in (one, other))
        return (left @ v.unflatten(-1, (self.N // low, low)) @ right).flatten(-2)

    def inner(self, x: Tensor) -> Tensor:
        return torch.einsum("tmk,mik->tmi", self.by_class(x), self.blocks).to(self.wide)

    def outer(self, w: Tensor) -> Tensor:
        return self.columns(torch.einsum("tmi,mik->tmk", w, self.blocks)) * self.scale

    def up(self, z: Tensor) -> Tensor:
        v = (self.mix(z) * self.lam).flatten(1)
        sums = self.transform(F.pad(v, (0, self.N - v.shape[1])))[:, self.rows]
        return sums * self.row * self.scale

    def u(self, y: Tensor) -> Tensor:
        folded = y.new_zeros(len(y), self.N, dtype=self.wide)
        folded = folded.index_add(1, self.rows, y.to(self.wide) * self.row)
        return self.transform(folded)[:, : self.r * self.n].unflatten(-1, (self.r, self.n))

    def w(self, u: Tensor) -> Tensor:
        return self.mix(u * self.lam, to_classes=True).to(self.of_classes)

    def diagonals(self, x: Tensor, z: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        dlam = (u * self.mix(z)).sum(0) * self.col.view(self.r, self.n)
        P = torch.einsum("tmi,tmk->imk", w, self.by_class(x))
        return dlam * self.scale, self.columns(P) * self.s * self.scale


def _plain_linear(x, weight, bias, lam, gam, s, row, col, expand, scale):
    p = _Plain(x, weight, bias, lam, gam, s, row, col, expand, scale)
    flat = x.reshape(-1, x.shape[-1])
    y = 0 if weight is None else F.linear(flat, weight, bias)
    y = y + (p.up(p.inner(flat)) if expand else p.outer(p.w(p.u(flat))))
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _plain_linear_backward(
    dy, x, weight, lam, gam, s, row, col, expand, scale, need_x, need_diagonals
):
    p = _Plain(x, weight, None, lam, gam, s, row, col, expand, scale, dy)
    flat, dflat = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    small, large = (flat, dflat) if expand else (dflat, flat)
    z, u = p.inner(small), p.u(large)
    w = p.w(u)
    dx = dlam = dgam = None
    if need_x:
        base = 0 if weight is None else dflat @ weight
        dx = ((p.outer(w) if expand else p.up(z)) + base).to(x.dtype).view(x.shape)
    if need_diagonals:
        dlam, dgam = p.diagonals(small, z, u, w)
        dlam, dgam = dlam.to(lam.dtype), dgam.to(gam.dtype)
    return dx, dlam, dgam


def _each(lam: Tensor, *tensors: Tensor | None) -> Iterator[tuple]:
    """Every expert's part of these tensors; None and vectors are for all."""
    parts: list = []
    for t in tensors:
        if t is None or t.dim() == 1:
            parts.append([t] * len(lam))
        elif len(t) == len(lam):
            parts.append(t)
        else:
            raise RuntimeError(f"randlora: lam has {len(lam)} experts, beside {tuple(t.shape)}")
    return zip(*parts, strict=True)


def _plain_weight(weight, lam, gam, s, row, col, expand, scale):
    if lam.dim() == 3:
        parts = _each(lam, weight, lam, gam, s, row)
        return torch.stack([_plain_weight(*part, col, expand, scale) for part in parts])
    like = lam if weight is None else weight
    sizes = (len(row), len(s)) if expand else (len(s), len(row))
    if weight is not None and tuple(weight.shape) != sizes:
        raise RuntimeError(f"randlora: weight must be {sizes}, got {tuple(weight.shape)}")
    # Row k is column k of B (lambda * A * gamma).
    delta = _plain_linear(_identity(like, s), None, None, lam, gam, s, row, col, True, scale)
    delta = delta.T if expand else delta
    return (delta if weight is None else weight.to(delta) + delta).to(like.dtype).contiguous()


def _plain_weight_backward(grad, lam, gam, s, row, col, expand, scale):
    if lam.dim() == 3:
        parts = _each(lam, grad, lam, gam, s, row)
        results = [_plain_weight_backward(*part, col, expand, scale) for part in parts]
        return tuple(map(torch.stack, zip(*results, strict=True)))
    one = _identity(grad, s)
    inputs = (grad.T if expand else grad).to(one), one, None, lam, gam, s, row, col, True, scale
    return _plain_linear_backward(*inputs, need_x=False, need_diagonals=True)[1:]


def _identity(like: Tensor, s: Tensor) -> Tensor:
    """x (d, d) in the compute type, for which y is dW or its transpose."""
    return torch.eye(len(s), dtype=torch.promote_types(like.dtype, torch.float32), device=s.device)


torch.library.impl("randlora::hadamard_weight", "default", _plain_weight)
for _name, _function in (
    ("hadamard_linear", _plain_linear),
    ("hadamard_linear_backward", _plain_linear_backward),
    ("hadamard_weight_backward", _plain_weight_backward),
):
    torch.library.impl(f"randlora::{_name}", "default", _function)
    # For csrc/torch/hadamard.cpp, which the dispatcher takes on cards that the sizes do not fit.
    _, _, _schema = str(getattr(_ops, _name).default._schema).partition("(")
    torch.library.define(f"randlora::{_name}_plain", f"({_schema}")
    torch.library.impl(f"randlora::{_name}_plain", "default", _function)
