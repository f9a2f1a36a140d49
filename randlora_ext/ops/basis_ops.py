"""Operators beside those of a layer: `scaled_basis`, lambda * A * gamma of a dense A
(csrc/torch/scaled_basis.cpp or plain torch), and the fake kernels of csrc/torch/basis_ops.cpp,
which randlora_ext/basis calls, and of add_rounded."""

import torch
from torch import Tensor

from .. import devices
from ..reference import scaled_basis_reference
from .registration import Operator, call_kernel, check_one_device, entry, fake, gradients

_ops = torch.ops.randlora
_library = torch.library.Library("randlora", "IMPL")  # registrations live as long as this


class ScaledBasis(Operator):
    @staticmethod
    def forward(A, lam, gam):
        return call_kernel(_ops.scaled_basis.default, A, lam, gam)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        dlam, dgam = gradients(_ops.scaled_basis_backward.default, grad, *ctx.saved_tensors)
        return None, dlam, dgam


scaled = entry("scaled_basis", ScaledBasis)


@fake
def scaled_basis(A, lam, gam):
    check_one_device(A=A, lam=lam, gam=gam)
    return A.new_empty((lam.shape[0] * lam.shape[1], A.shape[1]))


@fake
def scaled_basis_backward(grad, A, lam, gam):
    check_one_device(A=A, lam=lam, gam=gam, grad=grad)
    return lam.new_empty(lam.shape), gam.new_empty(gam.shape)


# ---- plain torch, for devices without our kernels ------------------------------------------------


def _plain(A: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
    wide = torch.promote_types(A.dtype, torch.float32)
    return scaled_basis_reference(A.to(wide), lam.to(wide), gam.to(wide)).to(A.dtype)


def _plain_backward(grad, A, lam, gam) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(grad.dtype, torch.float32)
    by_rank = grad.to(wide).unflatten(0, lam.shape) * A.to(wide)[:, None]  # (r, n, d)
    dlam = torch.einsum("jik,ik->ji", by_rank, gam.to(wide))
    dgam = torch.einsum("jik,ji->ik", by_rank, lam.to(wide))
    return dlam.to(lam.dtype), dgam.to(gam.dtype)


_library.impl("scaled_basis", _plain, "CompositeExplicitAutograd")
_library.impl("scaled_basis_backward", _plain_backward, "CompositeExplicitAutograd")


# ---- fake kernels of operators that have no gradient --------------------------------------------


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
    check_one_device(offset=offset, index=index)
    return offset.new_empty((offset.shape[0] // 2, cols), dtype=dtype)


@fake
def support_tables(a_offset, a_index, d):
    check_one_device(a_offset=a_offset, a_index=a_index)
    r, group = a_offset.shape[0] // 2, 32
    entries = (a_index.shape[0] // group + r) * group
    used = devices.cuda_serves(a_offset.device.type)
    return a_offset.new_empty((entries + r * d if used else 0,), dtype=torch.int32)


@fake
def add_rounded(weight, delta, rounding_seed):
    check_one_device(weight=weight, delta=delta)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)
