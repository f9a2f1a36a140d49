"""What every benchmark here needs: a process for each measurement, and results with their machine.

A measurement has a process of its own, so that no row inherits the heap, the caches of bases or the
thread pools of the one before, and so that a peak of memory is its own. The processes are forked
from a server that has imported the libraries, which takes seconds, and computed nothing.
"""

import json
import multiprocessing
import os
import platform
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import peft
import torch

from randlora_ext import build_info


def in_a_process(function: Callable, *args: Any, **options: Any) -> Any:
    """`function(*args, **options)` in a new process; BrokenProcessPool if it was killed."""
    context = multiprocessing.get_context("forkserver")
    # By name: Python before 3.11.9 tells the server neither the script nor the path of imports.
    context.set_forkserver_preload(
        ["randlora_ext.peft", "transformers.models.llama.modeling_llama"]
    )
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **options).result()


def show(row: dict, header: bool) -> None:
    """Prints a row as fixed columns, with the names above it if `header`."""
    if header:
        print("  ".join(f"{key:>11}" for key in row))
    cells = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()}
    print("  ".join(f"{cell:>{max(11, len(key))}}" for key, cell in cells.items()), flush=True)


def write(out: Path, rows: list[dict], **about: Any) -> None:
    """Writes OUT.json: `rows`, `about`, and the machine, versions, commit and date."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), **about, "rows": rows}, indent=1)
    out.with_suffix(".json").write_text(text + "\n")


def machine() -> dict:
    """What somebody else needs to compare timings."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "commit": _commit(),
        **build_info(),
    }


def _processor() -> str:
    if not os.path.exists("/proc/cpuinfo"):
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    said = {key.strip(): value.strip() for key, _, value in pairs}
    if "model name" not in said:
        return platform.machine()
    # Clouds shorten the name; family and model tell the generation.
    return f"{said['model name']} (family {said.get('cpu family')}, model {said.get('model')})"


def _commit() -> str:
    """The commit of this checkout; "-dirty" if the sources differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "-uno", "--", "randlora_ext", "csrc")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
    return f"{commit}-dirty" if changed else commit
