"""Parameters that are DTensors: what FSDP2 and tensor parallelism make of them outside forward."""

from typing import Any

from torch import Tensor


def is_dtensor(t: object) -> bool:
    # By its interface: most users never import torch.distributed.tensor, which takes a while.
    return isinstance(t, Tensor) and hasattr(t, "full_tensor")


def full_tensor(t: Any) -> Tensor:
    """A DTensor as one plain tensor, differentiable (all ranks must call); others as they are."""
    return t.full_tensor() if is_dtensor(t) else t


def laid_out_like(t: Tensor, weight: Any) -> Tensor:
    """A plain `t`, equal on all ranks, as a DTensor in the layout of `weight` where that is one."""
    if not is_dtensor(weight) or is_dtensor(t):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    replicated = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=weight.placements)


def refuse_dtensor(name: str, t: Any) -> None:
    """TypeError where `t` is a DTensor, of which torch says only that it is mixed with others."""
    if is_dtensor(t):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor placed {tuple(t.placements)}; in "
            "forward FSDP2 gives plain ones, for tensor parallelism there is "
            "randlora_ext.distributed, and elsewhere take t.to_local() or t.full_tensor()"
        )
