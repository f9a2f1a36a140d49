"""`scaled_basis`: lambda * A * gamma of a dense A; csrc/torch/scaled_basis.cpp or plain torch."""

import torch
from torch import Tensor

from ..reference import scaled_basis_reference
from . import vmap
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
vmap.register("scaled_basis")
vmap.register("scaled_basis_backward")


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
