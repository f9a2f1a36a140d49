"""DTensor parameters, as FSDP2 and tensor parallelism keep them outside forward."""

from typing import Any

from torch import Tensor


def is_dtensor(t: object) -> bool:
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


def refuse_dtensor(name: str, t: Any) -> None:
    """Raises TypeError if `t` is a DTensor; torch's own message would not say what to do."""
    if is_dtensor(t):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor placed {tuple(t.placements)}; in "
            "forward FSDP2 gives plain ones, for tensor parallelism there is "
            "randlora_ext.distributed, and elsewhere take t.to_local() or t.full_tensor()"
        )
