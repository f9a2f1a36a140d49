"""DTensor parameters, as FSDP2 and tensor parallelism keep them outside forward."""

from typing import Any

from torch import Tensor


def is_dtensor(t: Any) -> bool:
    # isinstance(t, DTensor) would import torch.distributed.tensor, which is slow.
    return isinstance(t, Tensor) and hasattr(t, "full_tensor")


def full_tensor(t: Any) -> Tensor:
    """A DTensor gathered to a plain tensor, differentiable (all ranks must call); else `t`."""
    return t.full_tensor() if is_dtensor(t) else t


def laid_out_like(t: Tensor, weight: Any) -> Tensor:
    """`t` in the layout of `weight` if that is a DTensor; `t` must be equal on all ranks."""
    if not is_dtensor(weight) or is_dtensor(t):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    replicated = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=weight.placements)
