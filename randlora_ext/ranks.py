"""Models that FSDP2 spreads over ranks: DTensor parameters, and ranks that fail together.

An error on one rank alone would leave the others waiting for it in the next collective.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def is_dtensor(t: Any) -> bool:
    # isinstance(t, DTensor) would import torch.distributed.tensor, which is slow.
    return isinstance(t, Tensor) and hasattr(t, "full_tensor")


def full_tensor(t: Any) -> Tensor:
    """A DTensor gathered to a plain tensor, differentiable (all ranks must call); else `t`."""
    return t.full_tensor() if is_dtensor(t) else t


def local_tensor(t: Any) -> Tensor:
    """This rank's part of a DTensor; else `t`."""
    return t.to_local() if is_dtensor(t) else t


def laid_out_like(t: Tensor, weight: Any) -> Tensor:
    """`t` in the layout of `weight` if that is a DTensor; `t` must be equal on all ranks."""
    if not is_dtensor(weight):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    replicated = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=weight.placements)


class OtherRankError(RuntimeError):
    """What a rank raises because another one has failed; its message has the other's error."""


@contextmanager
def failing_together(mesh: DeviceMesh | None) -> Iterator[None]:
    """If the block raises on one rank, every rank raises at the end of it.

    The others raise `OtherRankError`, or OSError if the first did. Code that may raise on one rank
    alone must not follow another collective in the block. Without a mesh there is one process.
    """
    raised: Exception | None = None
    try:
        yield
    except Exception as error:
        raised = error
    for rank, its in [] if mesh is None else _exchange(mesh, raised):
        if raised is None and its is not None:
            kind, text = its
            raised = (OSError if kind == "OSError" else OtherRankError)(f"rank {rank}: {text}")
    if raised is not None:
        raise raised


def _exchange(mesh: DeviceMesh, error: Exception | None) -> list[tuple[int, tuple | None]]:
    kind = "OSError" if isinstance(error, OSError) else type(error).__name__
    everyone = [(dist.get_rank(), None if error is None else (kind, str(error)))]
    for dim in range(mesh.ndim):
        parts: list[Any] = [None] * mesh.size(dim)
        dist.all_gather_object(parts, everyone, group=mesh.get_group(dim))
        everyone = [one for part in parts for one in part]
    return everyone
