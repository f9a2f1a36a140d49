"""Tables of docs/evidence.md from the rows of finetune.py.

    python benchmarks/forgetting.py zen5 zen4-2     reads results/forgetting-{zen5,zen4-2}.jsonl

At equal forgetting means: the held-out loss is interpolated over the logarithm of what was
forgotten, for each seed, between factors of dW at each rate; the lowest counts, or that of a run
that forgot less. At equal loss means: the logarithm of what was forgotten is interpolated over the
held-out loss, between factors and between rates; the least counts, or that of a run that learned
more. In tables of all runs a cell has loss and forgetting, means over the seeds, of
which the last column tells the number.
"""

import argparse
import json
import math
import re
import statistics
from itertools import pairwise
from pathlib import Path

from finetune import FACTORS

RESULTS = Path(__file__).parent / "results"
EQUAL = {  # held-out losses that most methods reach
    ("fp32", "spelling"): 1.2,
    ("fp32", "roman"): 1.3,
    ("fp32", "dates"): 1.39,
    ("fp32", "json"): 0.04,
    ("gemma", "spelling"): 0.95,
    ("gemma", "roman"): 1.1,
    ("gemma", "dates"): 1.27,
    ("gemma", "json"): 0.022,
}
MODELS = {"fp32": "SmolLM2", "gemma": "Gemma"}
RISES = 0.03, 0.1, 0.3  # of the loss on another text
ONE = "hadamard scaled:strength=one"  # for all layers of a model
METHODS = {  # method and layers
    "ours, all linear": (ONE, "all"),
    "ours, MLP": (ONE, "mlp"),
    "SHiRA, MLP": ("shira", "mlp"),
    "OFT, MLP": ("oft", "mlp"),
    "LoRA, MLP": ("lora", "mlp"),
}
OTHERS = {
    "not calibrated, MLP": ("hadamard", "mlp"),
    "SHiRA, all linear": ("shira", "all"),
    "OFT, all linear": ("oft", "all"),
    "LoRA, all linear": ("lora", "all"),
}
STRENGTHS = re.compile(r"hadamard scaled:strength=(.*)")  # one, or one for each layer
POWERS = {  # of the share that varies, in the formula of `calibrate`
    "p = 0": "hadamard scaled:p=0",
    "p = 1": "hadamard scaled:p=1",
    "p = 2, which calibrate takes": ONE,
    "p = 4": "hadamard scaled:p=4",
}
SIZES = {  # layers and r
    "MLP alone, 64": ("mlp", 64),
    "MLP alone, 32": ("mlp", 32),
    "MLP alone, 16": ("mlp", 16),
    "q, v, o, down, 32": ("four", 32),
    "all linear, 64": ("all", 64),
    "all linear, 32": ("all", 32),
}
RATE = 1e-3  # which we recommend


def read(names: list[str]) -> list[dict]:
    """The rows that reached a finite loss, of 40 steps and a scaling of 20."""
    texts = [(RESULTS / f"forgetting-{name}.jsonl").read_text() for name in names]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    return [r for r in rows if r["steps"] == 40 and r["scaling"] == 20 and "forgetting" in r]


def selected(rows: list[dict], **values) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def curves(rows: list[dict], text: str = "manual") -> list[list[tuple[float, float]]]:
    """Loss and forgetting of one method and seed: by factors of dW for each rate, and by rates."""
    names = [f"x {factor}" for factor in FACTORS]
    by_rate = [(row["held_out_loss"], row["forgetting"][text]) for row in rows]
    found = [by_rate]
    for row, trained in zip(rows, by_rate, strict=True):
        after = [row[name] for name in names if name in row]
        found.append([trained, *((each["held_out_loss"], each[text]) for each in after)])
    return [sorted(points) for points in found]


def between(loss: float, points: list[tuple[float, float]]) -> float | None:
    """What was forgotten at this loss, between the two neighbours around it."""
    for (low, more), (high, less) in pairwise(points):
        if low <= loss < high and more > 0 and less > 0:
            share = (loss - low) / (high - low)
            return math.exp((1 - share) * math.log(more) + share * math.log(less))
    return None


def at(loss: float, points: list[tuple[float, float]]) -> list[float]:
    """What those that learned at least as much forgot, and what lies between two neighbours."""
    found = [forgot for own, forgot in points if own <= loss]
    inside = between(loss, points)
    return found if inside is None else [*found, inside]


def loss_at(rise: float, points: list[tuple[float, float]]) -> list[float]:
    """The losses of those that forgot at most this much, and what lies between two neighbours."""
    found = [loss for loss, forgot in points if forgot <= rise]
    for (low, more), (high, less) in pairwise(points):
        if 0 < less < rise <= more:
            share = math.log(rise / less) / math.log(more / less)
            found.append(high + share * (low - high))
    return found


def loss_by_seed(rows: list[dict], rise: float, text: str = "manual") -> dict[int, float | None]:
    """Of each seed of one method the lowest loss when it had forgotten this much; None if every run
    forgot more."""
    found: dict[int, float | None] = {}
    for seed in sorted({row["seed"] for row in rows}):
        _, *by_factors = curves(selected(rows, seed=seed), text)
        losses = [loss for points in by_factors for loss in loss_at(rise, points)]
        found[seed] = min(losses, default=None)
    return found


def by_seed(rows: list[dict], loss: float, text: str = "manual") -> dict[int, float | None]:
    """Of each seed of one method the least that was forgotten at this loss; None if no run reached
    it."""
    found: dict[int, float | None] = {}
    for seed in sorted({row["seed"] for row in rows}):
        own = curves(selected(rows, seed=seed), text)
        found[seed] = min((value for points in own for value in at(loss, points)), default=None)
    return found


def mean_cell(of_seeds: dict[int, float | None]) -> str:
    reached = [value for value in of_seeds.values() if value is not None]
    if not reached:
        return "not reached" if of_seeds else ""
    of = "" if len(reached) == len(of_seeds) else f" of {len(of_seeds)}"
    return f"{statistics.fmean(reached):.3f} ({len(reached)}{of})"


def seeds_cell(of_seeds: dict[int, float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.3f}" for value in of_seeds.values())


def told(pairs: list[tuple[float, float]]) -> str:
    if not pairs:
        return ""
    loss, forgot = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    return f"{loss:.3f}; {forgot:.3f}"


def table(rows: list[dict], model: str, task: str) -> str:
    """A row per method, kind of layers, r and rate."""
    mine = [row for row in rows if (row["model"], row["task"]) == (model, task)]
    heads = ["method", "layers", "r", "rate", "as trained", *(f"x {f}" for f in FACTORS)]
    heads += ["code, prose", "seeds"]
    lines = [f"{model}, {task}\n", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    keys = dict.fromkeys((r["method"], r["targets"], r["r"], r["lr"]) for r in mine)
    for method, targets, r, rate in sorted(keys):
        these = [
            row
            for row in mine
            if (row["method"], row["targets"], row["r"], row["lr"]) == (method, targets, r, rate)
        ]
        cells = [told([(row["held_out_loss"], row["forgetting"]["manual"]) for row in these])]
        for factor in FACTORS:
            after = [row[f"x {factor}"] for row in these if f"x {factor}" in row]
            cells.append(told([(a["held_out_loss"], a["manual"]) for a in after]))
        others = ("code", "prose")
        means = [[r["forgetting"][o] for r in these if o in r["forgetting"]] for o in others]
        cells.append(", ".join(f"{statistics.fmean(m):.3f}" for m in means if m))
        cells.append(str(len(these)))
        lines.append(f"| {method} | {targets} | {r} | {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def heads(columns) -> list[str]:
    names = [f"{MODELS[model]}, {task}, {EQUAL[model, task]}" for model, task in columns]
    return [f"| | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]


def of_methods(rows: list[dict], methods: dict, cell, named=lambda model, task: "") -> str:
    """A row per model and task, a column per method and its layers; `cell(rows, model, task)` is a
    loss or what was forgotten, by seeds."""
    lines = [f"| | {' | '.join(methods)} |", "|" + "---|" * (len(methods) + 1)]
    for model, task in EQUAL:
        cells = []
        for method, targets in methods.values():
            these = selected(rows, method=method, targets=targets, r=32, model=model, task=task)
            cells.append(mean_cell(cell(these, model, task)))
        head = f"{MODELS[model]}, {task}{named(model, task)}"
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def at_equal_forgetting(rows: list[dict], rise: float, methods: dict, text: str = "manual") -> str:
    return of_methods(rows, methods, lambda these, *_: loss_by_seed(these, rise, text))


def at_equal_loss(rows: list[dict], methods: dict, text: str = "manual") -> str:
    """Some rows have the manual alone at factors, so other texts leave them out."""
    names = [f"x {factor}" for factor in FACTORS]
    return of_methods(
        [row for row in rows if all(text in row[name] for name in names if name in row)],
        methods,
        lambda these, *key: by_seed(these, EQUAL[key], text),
        lambda *key: f", {EQUAL[key]}",
    )


def by_power(rows: list[dict]) -> str:
    """Of q, v, o and down_proj at one rate, by seeds."""
    columns = [key for key in EQUAL if key[1] != "json"]
    lines = heads(columns)
    for name, method in POWERS.items():
        mine = selected(rows, method=method, targets="four", r=32, lr=RATE)
        cells = []
        for model, task in columns:
            these = selected(mine, model=model, task=task)
            cells.append(seeds_cell(by_seed(these, EQUAL[model, task])))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def by_size(rows: list[dict]) -> str:
    """Spelling with seed 0 at one rate, by layers and r: forgetting at equal loss, and the loss
    and forgetting as trained."""
    lines = ["| layers, r | " + " | ".join(
        f"{name}, parameters | at {EQUAL[model, 'spelling']} | as trained"
        for model, name in MODELS.items()
    ) + " |", "|" + "---|" * (1 + 3 * len(MODELS))]  # fmt: skip
    usual = {"method": ONE, "task": "spelling", "seed": 0, "lr": RATE}
    for name, (targets, r) in SIZES.items():
        cells = []
        for model in MODELS:
            mine = selected(rows, **usual, model=model, targets=targets, r=r)
            count = f"{mine[0]['parameters'] / 1e6:.2f} M" if mine else ""
            least = seeds_cell(by_seed(mine, EQUAL[model, "spelling"]))
            trained = told([(row["held_out_loss"], row["forgetting"]["manual"]) for row in mine])
            cells += [count, least, trained]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def dial_and_rate(rows: list[dict]) -> str:
    """Calibrated adapters, spelling: a lower rate as trained, and a higher one whose dW is scaled
    until it has the same loss."""
    lines = ["| | seed | rate | loss | forgot | a higher rate, scaled, forgot |", "|---" * 6 + "|"]
    for model, name in MODELS.items():
        for targets, layers in (("mlp", "MLP"), ("four", "four kinds")):
            mine = selected(rows, model=model, task="spelling", method=ONE, targets=targets, r=32)
            for seed in sorted({row["seed"] for row in mine}):
                of_seed = sorted(selected(mine, seed=seed), key=lambda row: row["lr"])
                for low, high in pairwise(of_seed):
                    by_factors = curves([high])[1]
                    loss, forgot = low["held_out_loss"], low["forgetting"]["manual"]
                    scaled = between(loss, by_factors)
                    if scaled is not None:
                        lines.append(
                            f"| {name}, {layers} | {seed} | {low['lr']:g} | {loss:.3f} "
                            f"| {forgot:.3f} | {high['lr']:g}: {scaled:.3f} |"
                        )
    return "\n".join(lines) + "\n"


def ranks(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return [float(order.index(i)) for i in range(len(values))]


def correlations(rows: list[dict]) -> str:
    """Spearman's rank correlation of the meter, KL(base, tuned) on what the base model wrote, with
    the rise of the loss on every text, by model and task; and of all tasks."""
    measured = [row for row in rows if "meter" in row]
    texts = "own", "manual", "code", "prose"
    lines = [f"| | runs | {' | '.join(texts)} |", "|---" * (2 + len(texts)) + "|"]
    for model in MODELS:
        of_model = selected(measured, model=model)
        tasks = dict.fromkeys(row["task"] for row in of_model)
        for task in (*tasks, "all"):
            mine = of_model if task == "all" else selected(of_model, task=task)
            if len(mine) > 3:
                meter = ranks([row["meter"] for row in mine])
                rises = [ranks([row["forgetting"][text] for row in mine]) for text in texts]
                cells = [f"{statistics.correlation(meter, rise):.2f}" for rise in rises]
                lines.append(f"| {MODELS[model]}, {task} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def strengths(rows: list[dict]) -> str:
    """Runs with one strength for each layer, and those with one for all of the same model, task,
    layers and seed: loss and forgetting as trained and scaled, and the meter."""
    names = ["as trained", *(f"x {factor}" for factor in FACTORS)]
    lines = [f"| | seed | strength | rate | {' | '.join(names)} | meter |", "|---" * 8 + "|"]
    runs = [row for row in rows if STRENGTHS.match(row["method"]) and row["r"] == 32]
    same = "model", "task", "targets", "seed"
    several = {tuple(row[k] for k in same) for row in runs if row["method"] != ONE}
    for case in sorted(several):
        for row in sorted(selected(runs, **dict(zip(same, case, strict=True))), key=_formula):
            model, task, targets, seed = case
            head = f"{MODELS[model]}, {task}, {'all linear' if targets == 'all' else 'MLP'}"
            cells = [told([(row["held_out_loss"], row["forgetting"]["manual"])])]
            scaled = [row[name] for name in names[1:]]
            cells += [told([(each["held_out_loss"], each["manual"])]) for each in scaled]
            cells.append(f"{row['meter']:.3f}" if "meter" in row else "")
            strength, rate = _formula(row)
            lines.append(f"| {head} | {seed} | {strength} | {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _formula(row: dict) -> tuple[str, float]:
    return STRENGTHS.match(row["method"])[1], row["lr"]  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+")
    rows = read(parser.parse_args().names)
    for methods in (METHODS, OTHERS):
        for rise in RISES:
            print(f"held-out loss at a rise of {rise} on the manual\n")
            print(at_equal_forgetting(rows, rise, methods))
        for text in ("manual", "code", "prose"):
            print(f"what was forgotten of the {text} at equal loss\n")
            print(at_equal_loss(rows, methods, text))
    print("one strength for each layer, and one for all\n")
    print(strengths(rows))
    print("by the power p\n")
    print(by_power(rows))
    print("by layers and r\n")
    print(by_size(rows))
    print("the dial and a lower rate\n")
    print(dial_and_rate(rows))
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in rows):
        print(table(rows, model, task))
    print("rank correlation of the meter with the rise of the loss on a text\n")
    print(correlations(rows))


if __name__ == "__main__":
    main()
