"""What every benchmark here needs: a process for each measurement, and results with their machine.

A measurement has a process of its own, so that no row inherits the heap, the caches of bases or the
thread pools of the one before, and so that a peak of memory is its own. The processes are forked
from a server that has imported the libraries, which takes seconds, and computed nothing.
"""

import csv
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from randlora_ext.cli.measure import machine


def in_a_process(function: Callable, *args: Any, **options: Any) -> Any:
    """`function(*args, **options)` in a new process; BrokenProcessPool where it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__, "__main__"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **options).result()


def show(row: dict, header: bool) -> None:
    """Prints a row as fixed columns, with the names above it where asked to."""
    if header:
        print("  ".join(f"{key:>11}" for key in row))
    cells = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()}
    print("  ".join(f"{cell:>{max(11, len(key))}}" for key, cell in cells.items()), flush=True)


def write(out: Path, rows: list[dict], **about: Any) -> None:
    """OUT.csv, and OUT.json with the machine, versions, commit and date; both hold `rows`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), **about, "rows": rows}, indent=1)
    out.with_suffix(".json").write_text(text + "\n")
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
