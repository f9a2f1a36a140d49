"""The operators on Hadamard bases, csrc/torch/hadamard.cpp: shapes and gradients.

    ``y = x W^T + bias + scale * x dW^T``,  ``dW = B (lambda * A * gamma)`` or its transpose
    ``A[j, k] = s[k] H[j, m]`` with the class ``m = (first_column + k) // n`` of column k
    ``B[o, c] = row[o] H[first_row + o, c] col[c]``, c = j * n + i

H is Sylvester's Hadamard matrix. Devices without our kernels take the bases as dense ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..basis import TernaryBasis
from .registration import (
    Operator,
    call_kernel,
    check_one_device,
    entry,
    fake,
    gradients,
    register_linear,
)

_ops = torch.ops.randlora


class Operands(NamedTuple):
    """The operators' arguments that describe the bases."""

    s: Tensor
    row: Tensor
    col: Tensor
    scale: float  # of dW
    first_row: int
    first_column: int
    expand: bool  # whether d is the input side


def operands(basis: TernaryBasis, device: torch.device | str, scaling: float = 1.0) -> Operands:
    """Those of `basis` on a device."""
    s, row, col = basis.packed(device)
    scale = float(scaling)
    return Operands(s, row, col, scale, basis.first_row, basis.first_column, basis.expand)


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
    check_one_device(lam=lam, gam=gam, s=s, row=row, col=col, weight=weight)
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
