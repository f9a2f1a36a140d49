"""The operators on Hadamard bases, csrc/torch/hadamard.cpp: shapes and gradients.

    ``y = x W^T + bias + scale * x dW^T``,  ``dW = B (lambda * A * gamma)`` or its transpose
    ``A[j, k] = s[k] H[j, m]`` with the class ``m = (first_column + k) // n`` of column k
    ``B[o, c] = row[o] H[first_row + o, c] col[c]``, c = j * n + i

H is Sylvester's Hadamard matrix. Devices without our kernels take the same steps in plain torch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..basis import TernaryBasis
from ..basis.hadamard import sylvester
from .dense import check_plain
from .registration import Operator, call_kernel, entry, fake, gradients, register_linear

_ops = torch.ops.randlora


def operands(basis: TernaryBasis, device: torch.device | str, scaling: float = 1.0) -> tuple:
    """The operators' arguments that describe the bases, from `s` to `expand`."""
    signs, first = basis.packed(device), (basis.first_row, basis.first_column)
    return *signs, float(scaling), *first, basis.expand


linear = register_linear(
    "hadamard_linear",
    lambda gam, s, row, col, scale, first_row, first_column, expand, merge: (
        row if expand else s
    ).shape[0],
)


@fake
def hadamard_weight(
    weight, lam, gam, s, row, col, scale, first_row, first_column, expand, rounding_seed
):
    D, d = row.shape[0], s.shape[0]
    return (lam if weight is None else weight).new_empty((D, d) if expand else (d, D))


class HadamardWeight(Operator):
    """Of W + dW; rounding counts as the identity."""

    @staticmethod
    def forward(weight, lam, gam, *rest):
        return call_kernel(_ops.hadamard_weight.default, weight, lam, gam, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, lam, gam, *ctx.bases, _ = inputs
        ctx.save_for_backward(lam, gam)

    @staticmethod
    def backward(ctx, grad):
        # <grad, dW> is the layer's output for the tokens of an identity matrix, weighted by grad.
        lam, gam = ctx.saved_tensors
        s, *_, expand = ctx.bases
        one = torch.eye(s.shape[0], dtype=grad.dtype, device=grad.device)
        dy, x = (grad.T.contiguous(), one) if expand else (one, grad)
        arguments = dy, x, None, lam, gam, *ctx.bases, False, False, True
        _, dlam, dgam = gradients(_ops.hadamard_linear_backward.default, *arguments)
        of_weight = grad if ctx.needs_input_grad[0] else None
        return of_weight, dlam, dgam, *[None] * (len(ctx.bases) + 1)


weight = entry("hadamard_weight", HadamardWeight)


# ---- plain torch ---------------------------------------------------------------------------


class _Plain:
    """The steps between x (T, d), its class products, and y (T, D). Checks what
    csrc/torch/hadamard.cpp checks."""

    def __init__(
        self, x, weight, bias, lam, gam, s, row, col, scale, first_row, first_column, expand,
        merge=False, dy=None,
    ):  # fmt: skip
        dtype, self.d, self.D = x.dtype, len(s), len(row)
        r = len(lam) if lam.dim() else 0
        check_plain(x, weight, bias, lam, gam, r, self.d, self.D, expand, merge, dy)
        self.r, self.n = lam.shape
        if tuple(col.shape) != (lam.numel(),):
            raise RuntimeError(f"randlora: col must be ({lam.numel()}), got {tuple(col.shape)}")
        rows, columns = 2**32 - self.D, lam.numel() - self.d
        if not (0 <= first_row <= rows and 0 <= first_column <= columns):
            raise RuntimeError(
                f"randlora: first_row must be in [0, {rows}] and first_column in [0, {columns}], "
                f"got {first_row} and {first_column}"
            )
        self.dtype, self.expand, self.scale = dtype, expand, scale
        self.wide = torch.promote_types(dtype, torch.float32)
        self.first = first_column // self.n
        self.place = first_column - self.first * self.n  # of the first column in its class
        self.classes, self.columns_of_class = -(-(self.place + self.d) // self.n), self.n
        if self.classes == 1:  # a slice of a wide layer: no zeros for the rest of its class
            self.place, self.columns_of_class = 0, self.d
        K = self.r * self.n
        self.N = 1 << (K - 1).bit_length()
        self.rows = (torch.arange(self.D, device=row.device) + first_row) % self.N
        self.s, self.row, self.col = (t.to(self.wide) for t in (s, row, col))
        self.lam = lam.to(self.wide) * self.col.view(self.r, self.n)
        # Powers of two that keep float16 in range, as in csrc/torch/hadamard.cpp.
        half = dtype == torch.float16
        self.of_gamma = 2.0 ** (round(math.log2(K)) - 3) if half else 1.0
        self.back = 2.0 ** -(((self.D * self.r).bit_length() + 1) // 2) if half else 1.0
        signed = (gam.to(self.wide) * (self.s * self.of_gamma)).to(dtype)
        self.blocks = self.by_class(signed).movedim(1, 0)  # (classes, n, columns of a class)

    def by_class(self, x: Tensor) -> Tensor:
        """(T, d) as (T, classes, columns of a class); columns that are missing are zero."""
        missing = self.classes * self.columns_of_class - self.place - self.d
        return F.pad(x, (self.place, missing)).unflatten(-1, (self.classes, self.columns_of_class))

    def columns(self, x: Tensor) -> Tensor:
        """The inverse of `by_class`."""
        return x.flatten(-2)[..., self.place : self.place + self.d]

    def mix(self, z: Tensor, to_classes: bool = False) -> Tensor:
        """Between the rank indices (T, r, n) and the classes (T, classes, n)."""
        classes = torch.arange(self.classes, device=z.device) + self.first
        H = sylvester(torch.arange(self.r, device=z.device), classes).to(self.wide)
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
        y = torch.einsum("tmi,mik->tmk", w, self.blocks).to(self.wide)
        return self.columns(y) * (self.scale / (self.of_gamma * self.back))

    def up(self, z: Tensor) -> Tensor:
        v = (self.mix(z) * self.lam).flatten(1)
        sums = self.transform(F.pad(v, (0, self.N - v.shape[1])))[:, self.rows]
        return sums * self.row * (self.scale / self.of_gamma)

    def u(self, y: Tensor) -> Tensor:
        folded = y.new_zeros(len(y), self.N, dtype=self.wide)
        folded = folded.index_add(1, self.rows, y.to(self.wide) * self.row)
        return self.transform(folded)[:, : self.r * self.n].unflatten(-1, (self.r, self.n))

    def w(self, u: Tensor) -> Tensor:
        return (self.mix(u * self.lam, to_classes=True) * self.back).to(self.dtype)

    def diagonals(self, x: Tensor, z: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        dlam = (u * self.mix(z)).sum(0) * self.col.view(self.r, self.n)
        P = torch.einsum("tmi,tmk->imk", w, self.by_class(x)).to(self.wide)
        dgam = self.columns(P) * self.s
        return dlam * (self.scale / self.of_gamma), dgam * (self.scale / self.back)


def _plain_linear(
    x, weight, bias, lam, gam, s, row, col, scale, first_row, first_column, expand, merge
):
    p = _Plain(
        x, weight, bias, lam, gam, s, row, col, scale, first_row, first_column, expand, merge
    )
    flat = x.reshape(-1, x.shape[-1])
    y = p.up(p.inner(flat)) if p.expand else p.outer(p.w(p.u(flat)))
    if weight is not None:
        y = y + F.linear(flat, weight, bias)
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _plain_linear_backward(
    dy, x, weight, lam, gam, s, row, col, scale, first_row, first_column, expand, merge, need_x,
    need_diagonals,
):  # fmt: skip
    p = _Plain(
        x, weight, None, lam, gam, s, row, col, scale, first_row, first_column, expand, merge, dy
    )
    flat, dflat = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    small, large = (flat, dflat) if p.expand else (dflat, flat)
    z, u = p.inner(small), p.u(large)
    w = p.w(u)
    dx, dlam, dgam = x.new_empty(0), lam.new_empty(0), gam.new_empty(0)
    if need_x:
        dx = p.outer(w) if p.expand else p.up(z)
        if weight is not None:
            dx = dx + dflat @ weight
        dx = dx.to(x.dtype).view(x.shape)
    if need_diagonals:
        dlam, dgam = p.diagonals(small, z, u, w)
        dlam, dgam = dlam.to(lam.dtype), dgam.to(gam.dtype)
    return dx, dlam, dgam


def _plain_weight(
    weight, lam, gam, s, row, col, scale, first_row, first_column, expand, rounding_seed
):
    if rounding_seed is not None:
        raise RuntimeError(f"randlora: rounding_seed needs our kernels, {lam.device} has none")
    like = lam if weight is None else weight
    sizes = (row.numel(), s.numel())[:: 1 if expand else -1]
    if weight is not None and tuple(weight.shape) != sizes:
        raise RuntimeError(f"randlora: weight must be {sizes}, got {tuple(weight.shape)}")
    dtype = torch.promote_types(like.dtype, torch.float32)
    one = torch.eye(s.shape[0], dtype=dtype, device=lam.device)
    p = _Plain(one, None, None, lam, gam, s, row, col, scale, first_row, first_column, expand=True)
    delta = p.up(p.inner(one))  # row k is column k of B (lambda * A * gamma)
    delta = delta.T if expand else delta
    return (delta if weight is None else weight.to(dtype) + delta).to(like.dtype).contiguous()


for _name, _function in (
    ("hadamard_linear", _plain_linear),
    ("hadamard_linear_backward", _plain_linear_backward),
    ("hadamard_weight", _plain_weight),
):
    torch.library.impl(f"randlora::{_name}", "default", _function)
