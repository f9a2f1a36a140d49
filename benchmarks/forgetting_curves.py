"""What was learned over what was forgotten, from rows of finetune.py: curves, and values between.

Each run is a curve, whose points are dW times 1, 0.7 and 0.4.
"""

import math
from itertools import pairwise

from finetune_rows import FACTORS

Points = list[tuple[float, float]]  # held-out loss, and what was forgotten; sorted


def selected(rows: list[dict], **values) -> list[dict]:
    return [row for row in rows if all(row.get(name) == value for name, value in values.items())]


def points(row: dict, text: str = "manual") -> Points:
    """A run as trained, and with less of dW. text: a rise, or "meter", "chat" or "agreement"."""
    found = [(row["held_out_loss"], forgot(row, text))]
    after = [row[f"x {factor}"] for factor in FACTORS if f"x {factor}" in row]
    return found + [(each["held_out_loss"], each[text]) for each in after if text in each]


def at_factor(row: dict, factor: float, text: str = "manual") -> tuple[float, float | None]:
    """The held-out loss with dW times this, and what was forgotten, if it was measured there."""
    if factor == 1:
        return row["held_out_loss"], forgot(row, text)
    scaled = row[f"x {factor}"]
    return scaled["held_out_loss"], scaled.get(text)


def forgot(row: dict, text: str) -> float:
    return row["forgetting"][text] if text in row["forgetting"] else row[text]


def has(row: dict, text: str) -> bool:
    return text in row or text in row["forgetting"]


def has_curve(row: dict, text: str) -> bool:
    """Whether it was measured at factors of dW, too."""
    scaled = [row[f"x {factor}"] for factor in FACTORS if f"x {factor}" in row]
    return has(row, text) and all(text in each for each in scaled)


def between(loss: float, curve: Points) -> float | None:
    """What was forgotten at this loss, between the two neighbours around it; on a straight line if
    one of them forgot nothing, else on one of logarithms."""
    for (low, more), (high, less) in pairwise(curve):
        if low <= loss < high:
            share = (loss - low) / (high - low)
            if more > 0 and less > 0:
                return math.exp((1 - share) * math.log(more) + share * math.log(less))
            return (1 - share) * more + share * less
    return None


def at(loss: float, curve: Points) -> list[float]:
    """What those that learned at least as much forgot, and what lies between two neighbours."""
    found = [forgotten for own, forgotten in curve if own <= loss]
    inside = between(loss, curve)
    return found if inside is None else [*found, inside]


def loss_at(rise: float, curve: Points) -> list[float]:
    """The losses of those that forgot at most this much, and what lies between two neighbours."""
    found = [loss for loss, forgotten in curve if forgotten <= rise]
    for (low, more), (high, less) in pairwise(curve):
        if less < rise <= more:
            if less > 0:
                share = math.log(rise / less) / math.log(more / less)
            else:
                share = (rise - less) / (more - less)
            found.append(high + share * (low - high))
    return found


def loss_by_seed(rows: list[dict], rise: float, text: str = "manual") -> dict[int, float | None]:
    """Of each seed of one method the lowest loss when it had forgotten this much; None if every run
    forgot more."""
    found: dict[int, float | None] = {}
    for seed in sorted({row["seed"] for row in rows}):
        curves = [sorted(points(row, text)) for row in selected(rows, seed=seed)]
        found[seed] = min((loss for curve in curves for loss in loss_at(rise, curve)), default=None)
    return found


def least_by_seed(rows: list[dict], loss: float, text: str = "manual") -> dict[int, float | None]:
    """Of each seed of one method the least that was forgotten at this loss, between factors of dW
    or between rates; None if no run reached it."""
    found: dict[int, float | None] = {}
    for seed in sorted({row["seed"] for row in rows}):
        runs = [points(row, text) for row in selected(rows, seed=seed)]
        curves = [sorted(curve) for curve in (*runs, [of_run[0] for of_run in runs])]
        found[seed] = min((value for curve in curves for value in at(loss, curve)), default=None)
    return found
