"""Runs checks of distributed programs: one start of the processes for all that need so many.

    python tests/distributed/distributed_ranks.py RANK WORLD FOLDER      one rank; started by `run`

A check is a function ``check_NAME(place)`` of one of `MODULES`; its ``WORLDS`` says for which
numbers of processes. After each check the ranks compare their results, and stop if some failed
and some did not.
"""

import importlib.util
import json
import os
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
HANG = 120  # seconds in one collective
OVERALL = 600  # seconds for all checks


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


def run(world: int, folder: Path) -> dict[str, str]:
    """The result of each check: "ok", or what every failing rank reported."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    outputs = [folder / f"{world}-{rank}.txt" for rank in range(world)]
    processes = []
    for rank, output in enumerate(outputs):
        command = [sys.executable, __file__, str(rank), str(world), str(folder)]
        with output.open("w") as out:
            processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
    deadline = time.monotonic() + OVERALL
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if any(p.poll() not in (None, 0) for p in processes):
                deadline = min(deadline, time.monotonic() + 5)  # the others wait in vain
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found: dict[str, list[str]] = {name: [] for name in checks(world)}
    for output in outputs:
        for line in output.read_text().splitlines():
            if line.startswith("RESULT "):
                name, verdict = json.loads(line[7:])
                found[name].append(verdict)
    tails = "\n".join(f"--- {o.name}\n{o.read_text()[-1500:]}" for o in outputs)
    return {
        name: "ok" if verdicts == ["ok"] * world else f"{verdicts or 'did not run'}\n{tails}"
        for name, verdicts in found.items()
    }


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
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
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
