"""What the tables of forgetting.py and ablations.py share: the rows, the cells, a row per task."""

import argparse
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from finetune_rows import identity, read_rows
from forgetting_curves import has_curve, loss_by_seed, selected

RESULTS = Path(__file__).parent / "results"
STORED = RESULTS / "forgetting.jsonl"  # the runs of which the pages tell
MODELS = {"fp32": "SmolLM2", "gemma": "Gemma"}
LAYERS = {"all": "all linear", "mlp": "MLP", "four": "q, v, o, down", "experts": "experts"}
TEXTS = {  # whose loss rises; of the last two it is KL(base, tuned)
    "manual": "manual",
    "code": "source",
    "prose": "prose",
    "meter": "own text",
    "chat": "answers",
}
EQUAL = {  # held-out losses that most methods reach in 40 steps
    ("fp32", "spelling"): 1.2,
    ("fp32", "roman"): 1.3,
    ("fp32", "dates"): 1.39,
    ("fp32", "json"): 0.04,
    ("gemma", "spelling"): 0.95,
    ("gemma", "roman"): 1.1,
    ("gemma", "dates"): 1.27,
    ("gemma", "json"): 0.022,
}
OURS = "hadamard scaled"
Methods = dict[str, tuple[str, str]]  # of each column: method and layers


def rows_named(arguments: list[str] | None, about: str) -> list[dict]:
    """Of the file that the arguments name, by default the stored one."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("file", nargs="?", type=Path, default=STORED, help="of finetune.py")
    return read(parser.parse_args(arguments).file)


def read(file: Path) -> list[dict]:
    """The rows that reached a finite loss, of a scaling of 20. Of equal runs what either measured;
    of what both did, the last."""
    runs: dict[tuple, dict] = {}
    for row in read_rows(file):
        run = runs.setdefault(identity(row), {})
        for key, value in row.items():
            run[key] = run.get(key, {}) | value if isinstance(value, dict) else value
    return [run for run in runs.values() if run["scaling"] == 20 and "forgetting" in run]


def of_one_task(rows: list[dict], steps: int = 40) -> list[dict]:
    """Neither mixed with own text nor followed by another task."""
    return selected(rows, steps=steps, then=None, mix=None)


def by_setting(rows: list[dict]) -> list[list[dict]]:
    """Rows that differ by their seeds alone."""
    found: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["method"], row["targets"], row["r"], row["lr"])):
        found.setdefault(identity({**row, "seed": None}), []).append(row)
    return [*found.values()]


def markdown(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = [*heads]
    lines = [
        "|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (heads, *rows)
    ]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]]) + "\n"


def mean_cell(of_seeds: dict[int, float | None], none: str = "not reached") -> str:
    reached = [value for value in of_seeds.values() if value is not None]
    if not reached:
        return none if of_seeds else ""
    of = "" if len(reached) == len(of_seeds) else f" of {len(of_seeds)}"
    return f"{statistics.fmean(reached):.3f} ({len(reached)}{of})"


def loss_cell(rows: list[dict], rise: float, text: str = "manual") -> str:
    return mean_cell(loss_by_seed(rows, rise, text), none="forgot more")


def seeds_cell(of_seeds: dict[int, float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.3f}" for value in of_seeds.values())


def means(values: Iterable[tuple[float, ...]]) -> str:
    """Of columns, each a mean."""
    return "; ".join(f"{statistics.fmean(column):.3f}" for column in zip(*values, strict=True))


def shown(rate: float) -> str:
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def by_task(
    rows: list[dict],
    columns: dict[str, Callable[[list[dict]], str]],
    head: Callable[[str, str], str] = lambda model, task: "",
) -> str:
    """A row per model and task, of whose runs each column makes a cell."""
    found = []
    for model, task in EQUAL:
        these = selected(rows, model=model, task=task)
        cells = [cell(these) for cell in columns.values()]
        if any(cells):
            found.append([f"{MODELS[model]}, {task}{head(model, task)}", *cells])
    return markdown(["", *columns], found)


def of_methods(methods: Methods, cell: Callable[[list[dict]], str]) -> dict:
    """Columns of `by_task`, one per method."""

    def of_one(method: str, targets: str, rows: list[dict]) -> str:
        return cell(selected(rows, method=method, targets=targets, r=32))

    return {name: partial(of_one, *method) for name, method in methods.items()}


def at_equal_forgetting(
    rows: list[dict], rise: float, methods: Methods, text: str = "manual"
) -> str:
    measured = [row for row in rows if has_curve(row, text)]
    return by_task(measured, of_methods(methods, partial(loss_cell, rise=rise, text=text)))
