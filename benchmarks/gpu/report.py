"""The rows of gpu_run.py as tables.

python -m gpu.report results/gpu-CARD.jsonl      from benchmarks/
"""

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from .rows import OUT_OF_TIME

Row = dict
STOPPED, EARLY = "stopped after", "stopped early"
NOT_BUILT = "it was not built"


def read(file: Path) -> list[Row]:
    """All rows; a line that a kill cut short is left out."""
    found = []
    for line in file.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def latest(stage: str, rows: list[Row]) -> list[Row]:
    """The rows of a stage's last run."""
    mine = [row for row in rows if row["stage"] == stage]
    starts = [at for at, row in enumerate(mine) if "begins" in row]
    return mine[starts[-1] + 1 :] if starts else mine


def outcome(stage: str, rows: list[Row]) -> str:
    """ "ok", "failed", EARLY if only time was lacking, or "left out"."""
    mine = latest(stage, rows)
    verdicts = [row["verdict"] for row in mine if "verdict" in row]
    if any("failed" in row for row in mine) or any(v.startswith("exit") for v in verdicts):
        return "failed"
    late = any("skipped" in row and row["why"] == OUT_OF_TIME for row in mine)
    if late or any(verdict.startswith(STOPPED) for verdict in verdicts):
        return EARLY
    return "ok" if verdicts else "left out"


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def table(head: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    head = list(head)
    every = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(map(cell, line)) + " |\n" for line in every)


def flat(rows: list[Row], *keys: str) -> str:
    return table(keys, ([row.get(key) for key in keys] for row in rows))


def by_tokens(rows: list[Row], show: Callable[[Row], str]) -> str:
    """For each size a table: a line for each method and its bases, a column for each T."""
    parts = []
    for size in dict.fromkeys(row["size"] for row in rows):
        cells = {
            (r["method"], r.get("bases", ""), r["tokens"]): show(r)
            for r in rows
            if r["size"] == size
        }
        tokens = sorted({key[2] for key in cells})
        head = [f"{size} (in x out)", "bases", *(f"T = {count}" for count in tokens)]
        lines = ([*key, *(cells.get((*key, count)) for count in tokens)]
                 for key in dict.fromkeys(key[:2] for key in cells))  # fmt: skip
        parts.append(table(head, lines))
    return "\n".join(parts)


def figures(stage: str, rows: list[Row]) -> list[str]:
    timed = [row for row in rows if "us" in row or "step_ms" in row]
    if not timed:
        return []
    if stage in ("layers", "hadamard"):
        return [
            "Forward and backward, ms (over the frozen layer).\n",
            by_tokens(timed, lambda r: f"{cell(r['step_ms'])} ({r['over_frozen']:.2f}x)"),
            "Forward and backward as Python launches them, ms.\n",
            by_tokens(timed, lambda r: cell(r["eager_ms"])),
        ]
    if stage == "kernels":
        keys = ("op", "size", "bases", "tokens", "us", "byte_us", "operation_us", "over_floor")
        return [flat(timed, *keys)]
    keys = ("method", "tokens_per_s", "step_ms", "host_ms", "device_ms", "peak_bytes",
            "adapter_bytes")  # fmt: skip
    return [flat(timed, *keys)]


def of_stage(stage: str, rows: list[Row]) -> str:
    """Outcome, figures, checks, commands with their verdicts, what failed or was left out."""
    mine = latest(stage, rows)
    parts = [f"{outcome(stage, rows)}\n", *figures(stage, mine)]
    if errors := [row["error"] for row in mine if "error" in row]:
        parts.append(f"{len(errors)} checks against float64, largest error {max(errors):.1e}.\n")
    parts.append(flat([r for r in mine if "command" in r], "command", "verdict", "seconds", "said"))
    for ending in ("failed", "skipped"):
        parts += [f"- {ending}: {row[ending]}: {row['why']}" for row in mine if ending in row]
    return "\n".join(parts) + "\n"


def markdown(rows: list[Row]) -> str:
    about = [row for row in rows if row["stage"] == "run"][-1]
    facts = ", ".join(f"{key} {cell(value)}" for key, value in about.items() if key != "stage")
    names = dict.fromkeys(row["stage"] for row in rows if row["stage"] != "run")
    head = f"# {about.get('card', 'no card')}\n\nMade by benchmarks/gpu_run.py: {facts}.\n"
    return "\n".join([head, *(f"## {name}\n\n{of_stage(name, rows)}" for name in names)])


if __name__ == "__main__":
    print(markdown(read(Path(sys.argv[1]))))
