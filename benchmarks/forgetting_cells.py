"""Cells of forgetting.py's tables, and names in them."""

import statistics
from collections.abc import Iterable

from finetune_rows import identity

MODELS = {"fp32": "SmolLM2", "gemma": "Gemma"}
LAYERS = {"all": "all linear", "mlp": "MLP", "four": "q, v, o, down", "experts": "experts"}


def markdown(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = [*heads]
    lines = [heads, *rows]
    made = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([made[0], "|" + "---|" * len(heads), *made[1:]]) + "\n"


def mean_cell(of_seeds: dict[int, float | None]) -> str:
    reached = [value for value in of_seeds.values() if value is not None]
    if not reached:
        return "not reached" if of_seeds else ""
    of = "" if len(reached) == len(of_seeds) else f" of {len(of_seeds)}"
    return f"{statistics.fmean(reached):.3f} ({len(reached)}{of})"


def seeds_cell(of_seeds: dict[int, float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.3f}" for value in of_seeds.values())


def means(values: Iterable[tuple[float, ...]]) -> str:
    """Of columns, each a mean."""
    return "; ".join(f"{statistics.fmean(column):.3f}" for column in zip(*values, strict=True))


def by_setting(rows: list[dict]) -> list[list[dict]]:
    """Rows that differ by their seeds alone."""
    found: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["method"], row["targets"], row["r"], row["lr"])):
        found.setdefault(identity({**row, "seed": None}), []).append(row)
    return [*found.values()]


def named(row: dict) -> list[str]:
    return [row["method"], LAYERS[row["targets"]], str(row["r"]), f"{row['lr']:g}"]
