"""What identifies a row of finetune.py, and the table of rows that it prints."""

import json
import statistics
from pathlib import Path

KEY = "task", "method", "lr", "seed", "steps", "scaling", "r", "targets", "model"
MORE = "then", "mix"  # of the key, too, in rows that have them
FACTORS = (0.7, 0.4)  # of dW after training
JUMP = 0.5  # a rise of the training loss over the mean of the five steps before


def identity(row: dict) -> tuple:
    return tuple(row.get(name) for name in (*KEY, *MORE))


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def jumps(losses: list[float]) -> bool:
    return any(
        losses[i] > JUMP + statistics.fmean(losses[i - 5 : i]) for i in range(10, len(losses))
    )


def table(rows: list[dict]) -> str:
    """Markdown, one row per setting: means over seeds, and each seed's."""
    heads = ["task", "method", "layers", "r", "model", "steps", "lr", "held-out loss (seeds)"]
    heads += ["jumps", "forgetting: manual (seeds)", "code"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    settings: dict[tuple, list[dict]] = {}
    for row in rows:
        settings.setdefault(identity({**row, "seed": None}), []).append(row)
    for mine in settings.values():
        first = mine[0]
        task = " then ".join(first[name] for name in ("task", "then") if name in first)
        method = first["method"] + (f", mix {first['mix']}" if "mix" in first else "")
        cells = [task, method, *(str(first[name]) for name in ("targets", "r", "model", "steps"))]
        cells += [f"{first['lr']:g}", _told([row["held_out_loss"] for row in mine], 3)]
        cells.append(f"{sum(jumps(row.get('train_loss', [])) for row in mine)} of {len(mine)}")
        forgot = [row["forgetting"] for row in mine if "forgetting" in row]
        cells.append(_told([each["manual"] for each in forgot], 2) if forgot else "failed")
        code = [each["code"] for each in forgot if "code" in each]
        cells.append(f"{statistics.fmean(code):.2f}" if code else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _told(values: list[float], digits: int) -> str:
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{statistics.fmean(values):.{digits}f} ({each})"
