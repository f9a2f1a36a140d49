"""Models spread over ranks: DTensor parameters, and ranks that agree or fail together.

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


def laid_out_like(t: Tensor, weight: Any) -> Tensor:
    """`t` in the layout of `weight` if that is a DTensor; `t` must be equal on all ranks."""
    if not is_dtensor(weight) or is_dtensor(t):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    replicated = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=weight.placements)


class OtherRankError(RuntimeError):
    """What a rank raises because another one has failed; its message has the other's error."""


def same_on_all_ranks(mesh: DeviceMesh, values: dict[str, Any]) -> None:
    """Raises ValueError on every rank unless each has the same `values` by name.

    Every rank of `mesh` must call this or be in `failing_together`.
    """
    everyone = _exchanged(mesh, values)
    for name in {name: None for _, its in everyone for name in its}:  # in order
        told = {rank: repr(its.get(name))[:200] for rank, its in everyone}
        if len(set(told.values())) > 1:
            by_rank = ", ".join(f"{value} on rank {rank}" for rank, value in told.items())
            raise _known(ValueError(f"{name} must be equal on all ranks, got {by_rank}"))


@contextmanager
def failing_together(mesh: DeviceMesh | None) -> Iterator[None]:
    """If the block raises on one rank, every rank raises at the end of it.

    The others raise `OtherRankError`, or OSError if the first did; those in `same_on_all_ranks`
    raise immediately. Code that may raise on one rank alone must not follow another collective in
    the block. Without a mesh there is one process.
    """
    if mesh is None:
        yield
        return
    try:
        yield
    except Exception as error:
        if not getattr(error, "known_to_all_ranks", False):
            _exchange(mesh, None, _known(error))
        raise
    _exchanged(mesh, {})


def _exchanged(mesh: DeviceMesh, values: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """The values by rank; raises what a rank in `failing_together` has sent instead."""
    everyone = _exchange(mesh, values, None)
    for rank, its, error in everyone:
        if its is None:
            kind, text = error
            raised = OSError if kind == "OSError" else OtherRankError
            raise _known(raised(f"rank {rank}: {text}"))
    return [(rank, its) for rank, its, _ in everyone]


def _exchange(mesh: DeviceMesh, values: dict[str, Any] | None, error: Exception | None) -> list:
    kind = "OSError" if isinstance(error, OSError) else type(error).__name__
    everyone = [(dist.get_rank(), values, (kind, str(error)))]
    for dim in range(mesh.ndim):
        parts: list[Any] = [None] * mesh.size(dim)
        dist.all_gather_object(parts, everyone, group=mesh.get_group(dim))
        everyone = [one for part in parts for one in part]
    return everyone


def _known(error: Exception) -> Exception:
    error.known_to_all_ranks = True  # type: ignore[attr-defined]
    return error
