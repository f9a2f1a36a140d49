"""The operators on packed ternary bases, independent or imported: csrc/torch/linear.cpp and
delta_weight.cpp. They need our kernels."""

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

    packed: list[Tensor]
    format: str  # of `packed` (docs/formats.md)
    D: int
    expand: bool  # whether d is the input side
    scale: float  # of dW


def operands(basis: TernaryBasis, device: torch.device | str, scaling: float = 1.0) -> Operands:
    """Those of `basis` on a device."""
    packed = basis.packed(device)
    return Operands(packed, basis.format, basis.D, basis.expand, float(scaling * basis.scale))


linear = register_linear(
    "linear",
    lambda gam, packed, format, D, expand, scale, path, b_dense: D if expand else gam.shape[1],
)


@fake
def delta_weight(lam, gam, packed, format, D, expand, scale):
    check_one_device(lam=lam, gam=gam, packed=packed)
    d = gam.shape[1]
    return lam.new_empty((D, d) if expand else (d, D))


@fake
def delta_weight_backward(grad, lam, gam, packed, format, D, expand, scale):
    check_one_device(lam=lam, gam=gam, packed=packed, grad=grad)
    return lam.new_empty(lam.shape), gam.new_empty(gam.shape)


@fake
def merged_weight(weight, lam, gam, packed, format, D, expand, scale, rounding_seed):
    check_one_device(lam=lam, gam=gam, packed=packed, weight=weight)
    return weight.new_empty(weight.shape)


class DeltaWeight(Operator):
    @staticmethod
    def forward(lam, gam, *bases):
        return call_kernel(_ops.delta_weight.default, lam, gam, *bases)

    @staticmethod
    def setup_context(ctx, inputs, output):
        lam, gam, *ctx.bases = inputs
        ctx.save_for_backward(lam, gam)

    @staticmethod
    def backward(ctx, grad):
        op = _ops.delta_weight_backward.default
        dlam, dgam = gradients(op, grad, *ctx.saved_tensors, *ctx.bases)
        return dlam, dgam, *[None] * len(ctx.bases)


delta = entry("delta_weight", DeltaWeight)
