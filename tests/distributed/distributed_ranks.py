"""Runs checks of distributed programs: one start of the processes for all that need so many.

    python tests/distributed/distributed_ranks.py FOLDER      all ranks; started by `run`

A check is a function ``check_NAME(place)`` of one of `MODULES`; its ``WORLDS`` says for which
numbers of processes. After each check the ranks compare their results, and stop if some failed
and some did not.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def importable(name: str) -> bool:
    package = name.rpartition(".")[0]
    return (not package or importable(package)) and importlib.util.find_spec(name) is not None


MODULES = ["distributed_data_parallel", "distributed_tensor_parallel", "distributed_layers"]
if importable("peft"):
    MODULES += ["distributed_peft"]
    if importable("transformers.distributed.tensor_parallel"):  # since 5.17
        MODULES += ["distributed_tp_plan"]
NUMBERS = (2, 4)  # of processes, in this order: 4 read the checkpoints of 2
HANG = 120  # seconds in one collective
OVERALL = 900  # seconds for all checks


@dataclass
class Place:
    rank: int
    world: int
    folder: Path  # common to all ranks, and to the runs of other numbers of processes

    def mesh(self, *sizes: int, names: tuple[str, ...] | None = None):
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh("cpu", sizes or (self.world,), mesh_dim_names=names)


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

    @property
    def sizes(self) -> list[int]:
        return [size for _, size in self.sent]


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def adam(model):
    return torch.optim.Adam(trained(model), lr=1e-2)


def equal_on_all_ranks(t, world):
    copies = [torch.empty_like(t) for _ in range(world)]
    dist.all_gather(copies, t)
    return all(torch.equal(t, other) for other in copies)


def full_tensor(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def same_parameters(model, reference, rtol=1e-9, atol=1e-9):
    pairs = zip(model.named_parameters(), reference.named_parameters(), strict=True)
    for (name, ours), (other, theirs) in pairs:
        assert name == other
        torch.testing.assert_close(full_tensor(ours), theirs, rtol=rtol, atol=atol)


def checks(world: int) -> dict[str, Callable[[Place], None]]:
    """The checks for so many processes by name, in the order of the files."""
    return {
        f"{module}.{name}": check
        for module in MODULES
        for name, check in vars(importlib.import_module(module)).items()
        if name.startswith("check_") and world in check.WORLDS
    }


def worlds(*sizes: int):
    """Decorator: the numbers of processes of a check."""

    def mark(check):
        check.WORLDS = sizes
        return check

    return mark


def run(folder: Path) -> dict[str, str]:
    """The result of each check: "ok", or what every failing rank reported."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, __file__, str(folder)]
    ranks = subprocess.Popen(command, env=environment, start_new_session=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
        ranks.wait(OVERALL)
    with contextlib.suppress(ProcessLookupError):  # there is none left
        os.killpg(ranks.pid, signal.SIGKILL)
    ranks.wait()
    results = {}
    for world in NUMBERS:
        found: dict[str, list[str]] = {name: [] for name in checks(world)}
        tails = ""
        for output in sorted(folder.glob(f"{world}-*.txt")):
            said = output.read_text()
            tails += f"--- {output.name}\n{said[-1500:]}\n"
            for line in said.splitlines():
                if line.startswith("RESULT "):
                    name, verdict = json.loads(line[7:])
                    found[name].append(verdict)
        for name, verdicts in found.items():
            told = "ok" if verdicts == ["ok"] * world else f"{verdicts or 'did not run'}\n{tails}"
            results[f"{name} on {world}"] = told
    return results


def main(folder: Path) -> None:
    """Forks the ranks when all is imported, and waits for them; after one failed not for long."""
    torch.set_num_threads(1)
    checks(2)
    for world in NUMBERS:
        children = set()
        for rank in range(world):
            if (child := os.fork()) == 0:
                with (folder / f"{world}-{rank}.txt").open("w") as out:
                    os.dup2(out.fileno(), 1)
                    os.dup2(out.fileno(), 2)
                run_rank(rank, world, folder)
            children.add(child)
        while children:
            child, status = os.wait()
            children.remove(child)
            if status:
                time.sleep(5)  # the others wait in vain
                sys.exit(1)


def run_rank(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / f'{world}.store'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=HANG),
    )
    place = Place(rank, world, folder)
    for name, check in checks(world).items():
        began = time.perf_counter()
        try:
            check(place)
            verdict = "ok"
        except BaseException:
            verdict = traceback.format_exc()
        print("RESULT", json.dumps([name, verdict]), flush=True)
        print(f"{name} took {time.perf_counter() - began:.2f} s", flush=True)
        verdicts = [None] * world
        dist.all_gather_object(verdicts, verdict)
        if len({v == "ok" for v in verdicts}) > 1:
            os._exit(1)  # ranks are no longer at the same place
    os._exit(0)  # taking the gloo group down at exit hangs now and then


if __name__ == "__main__":
    main(Path(sys.argv[1]))
