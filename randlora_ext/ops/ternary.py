"""The operators on packed ternary bases, independent or imported: csrc/torch/linear.cpp and
delta_weight.cpp; and those that make packed bases, basis_ops.cpp. They need our kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import devices
from ..basis import TernaryBasis
from .registration import Operator, call_kernel, entry, fake, gradients, register_linear

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
    d = gam.shape[1]
    return lam.new_empty((D, d) if expand else (d, D))


@fake
def delta_weight_backward(grad, lam, gam, packed, format, D, expand, scale):
    return lam.new_empty(lam.shape), gam.new_empty(gam.shape)


@fake
def merged_weight(weight, lam, gam, packed, format, D, expand, scale, rounding_seed):
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


# ---- fake kernels of the operators that make bases, which have no gradient -----------------------


@fake
def fill_planes_(planes, seed, role, row_start, col_start, cols, threshold):
    return None


@fake
def pack_dense(dense):
    rows, cols = dense.shape
    return (
        dense.new_empty((2, rows, (cols + 63) // 64), dtype=torch.int64),
        torch.empty((), dtype=torch.float64),  # the host reads it
    )


@fake
def planes_to_lists(planes, cols, by_column, wide):
    lines = cols if by_column else planes.shape[1]
    entries = torch.library.get_ctx().new_dynamic_size()
    return (
        planes.new_empty((2 * lines + 1,), dtype=torch.int64),
        planes.new_empty((entries,), dtype=torch.int32 if wide else torch.int16),
    )


@fake
def planes_to_dense(planes, cols, value, dtype):
    return planes.new_empty((planes.shape[1], cols), dtype=dtype)


@fake
def lists_to_dense(offset, index, cols, value, dtype):
    return offset.new_empty((offset.shape[0] // 2, cols), dtype=dtype)


@fake
def support_tables(a_offset, a_index, d):
    r, group = a_offset.shape[0] // 2, 32
    entries = (a_index.shape[0] // group + r) * group
    used = devices.cuda_serves(a_offset.device.type)
    return a_offset.new_empty((entries + r * d if used else 0,), dtype=torch.int32)
