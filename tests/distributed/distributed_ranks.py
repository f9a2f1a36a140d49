"""Runs checks of distributed programs: one start of the processes for all that need so many.

    python tests/distributed/distributed_ranks.py FOLDER

A check is a function ``check_NAME(place)`` of one of `MODULES`; `worlds` says for which numbers of
processes. The first that fails ends all.
"""

import importlib.util
import os
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MODULES = ["distributed_training"]
if importlib.util.find_spec("peft"):
    MODULES += ["distributed_peft"]
    if importlib.util.find_spec("trl"):  # which brings transformers, accelerate and datasets along
        MODULES += ["distributed_trainer"]
        if importlib.util.find_spec("deepspeed"):
            MODULES += ["distributed_deepspeed"]
NUMBERS = (2, 4)  # of processes, in this order: 4 read the checkpoints of 2
HANG = 120  # seconds in one collective


@dataclass
class Place:
    rank: int
    world: int
    folder: Path  # common to all ranks, and to the runs of other numbers of processes


class RecordedCollectives(TorchDispatchMode):
    """Records every collective inside the context as (operator, bytes of its largest tensor)."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("wait_tensor", "_wrap_tensor")  # not collectives themselves
        if "c10d" in func.namespace and not func.__name__.startswith(waits):
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.sent.append((func.__name__, max(t.numel() * t.itemsize for t in tensors)))
        return func(*args, **(kwargs or {}))

    def sizes(self, operator: str = "") -> list[int]:
        return [size for name, size in self.sent if operator in name]


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def bytes_of(parameters):
    return sum(p.numel() * p.itemsize for p in parameters)


def adam(model):
    return torch.optim.Adam(trained(model), lr=1e-2)


def sgd(model):
    """For comparisons in float32: Adam divides a gradient near zero by its own size, and with it
    what was rounded, which differs between processors."""
    return torch.optim.SGD(trained(model), lr=1e-2)


def full_tensor(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


@torch.no_grad()
def same_parameters(model, reference, limit=1e-9):
    """||ours - theirs|| is at most limit * ||theirs||, of each parameter."""
    pairs = zip(model.named_parameters(), reference.named_parameters(), strict=True)
    for (name, ours), (other, theirs) in pairs:
        assert name == other
        difference = (full_tensor(ours) - theirs).norm()
        assert difference <= limit * theirs.norm(), f"{name}: {difference / theirs.norm()}"


def worlds(*sizes: int):
    """Decorator: the numbers of processes of a check."""

    def mark(check):
        check.worlds = sizes
        return check

    return mark


def main(folder: Path) -> None:
    """Forks the ranks when all is imported, and waits for them."""
    torch.set_num_threads(1)
    modules = [importlib.import_module(name) for name in MODULES]
    everything = [value for module in modules for value in vars(module).values()]
    for world in NUMBERS:
        checks = [value for value in everything if world in getattr(value, "worlds", ())]
        start_processes(run_rank, (world, folder, checks), world, start_method="fork")


def run_rank(rank: int, world: int, folder: Path, checks: list) -> None:
    sys.stdout.reconfigure(write_through=True)  # whole lines, among those of other ranks
    try:
        store = f"file://{folder / f'{world}.store'}"
        sizes = {"rank": rank, "world_size": world}
        dist.init_process_group("gloo", store, timedelta(seconds=HANG), **sizes)
        for check in checks:
            name = f"rank {rank} of {world}: {check.__module__}.{check.__name__}"
            sys.stdout.write(f"{name}\n")
            check(Place(rank, world, folder))
            sys.stdout.write(f"{name} passed\n")
            dist.barrier()
    except BaseException:
        sys.stdout.write(f"rank {rank} of {world}: {traceback.format_exc()}")
        time.sleep(5)  # until the others have told what they wait for
        os._exit(1)
    os._exit(0)  # taking the gloo group down at exit hangs now and then


if __name__ == "__main__":
    main(Path(sys.argv[1]))
