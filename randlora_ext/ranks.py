"""Several ranks: what all of them have, FSDP2's DTensor parameters, and what ZeRO-3 has taken
apart."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # slow to import
    from torch.distributed.tensor import DTensor


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's, 0 if there is one alone."""
    return dist.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _is_distributed() else 1


def of_all_ranks(value: Any) -> list[Any]:
    """The values of all ranks, in their order."""
    values: list[Any] = [value] * world_size()
    if _is_distributed():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def failing_together() -> Iterator[None]:
    """What is raised inside it on one rank is raised on all, so that none waits for another; all
    ranks must enter. (A sharded model is computed by all ranks together: there the others wait.)"""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    told = of_all_ranks(None if error is None else repr(error))
    if error is not None:
        raise error
    for number, of_other in enumerate(told):
        if of_other is not None:
            raise RuntimeError(f"rank {number} failed: {of_other}")


def add_up_ranks(total: Tensor) -> None:
    """Gives all ranks the sum of theirs, in place."""
    if _is_distributed():
        own = total.cuda() if dist.get_backend() == "nccl" else total  # it knows only cards
        dist.all_reduce(own)
        total.copy_(own)


def is_dtensor(t: object) -> "TypeGuard[DTensor]":
    return isinstance(t, Tensor) and hasattr(t, "full_tensor")


def full_tensor(t: Tensor) -> Tensor:
    """A DTensor gathered to a plain tensor, differentiable (all ranks must call); else `t`."""
    return t.full_tensor() if is_dtensor(t) else t


def local_tensor(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; else `t`."""
    return t.to_local() if is_dtensor(t) else t


def laid_out_like(t: Tensor, weight: Tensor) -> Tensor:
    """`t` in the layout of `weight` if that is a DTensor; `t` must be equal on all ranks."""
    if not is_dtensor(weight):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    replicated = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=weight.placements)


@contextmanager
def gathered(parameters: Iterable[Tensor], writes: bool = False) -> Iterator[None]:
    """Inside it those that DeepSpeed's ZeRO-3 has taken apart are whole; all ranks must enter.

    writes: what is written inside is kept, which costs a broadcast.
    """
    apart = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not apart:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(apart, modifier_rank=0 if writes else None):
        yield
