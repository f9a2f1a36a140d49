"""Tables of docs/evidence.md from the rows of finetune.py.

    python benchmarks/forgetting.py zen5 zen4-3     reads results/forgetting-{zen5,zen4-3}.jsonl

At equal forgetting means: the held-out loss is interpolated over the logarithm of what was
forgotten, for each seed, between factors of dW at each rate; the lowest counts, or that of a run
that forgot less. At equal loss means: the logarithm of what was forgotten is interpolated over the
held-out loss, between factors and between rates; the least counts, or that of a run that learned
more. In tables of all runs a cell has loss and forgetting, means over the seeds, of
which the last column tells the number.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from finetune_rows import FACTORS, identity, read_rows
from forgetting_cells import (
    LAYERS,
    MODELS,
    by_setting,
    markdown,
    mean_cell,
    means,
    named,
    seeds_cell,
)
from forgetting_correlations import correlations, correlations_of_skills, correlations_of_the_task
from forgetting_curves import between, has_curve, least_by_seed, loss_by_seed, points, selected

RESULTS = Path(__file__).parent / "results"
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
RISES = {  # of the loss on a text; "meter" and "chat" are KL(base, tuned) on own text and answers
    "manual": (0.03, 0.1, 0.3),
    "code": (0.1,),
    "prose": (0.1,),
    "meter": (0.1, 0.2, 0.3),
    "chat": (0.1, 0.2),
}
OURS = "hadamard scaled"
LIMITED = "hadamard scaled:strength=limited"  # by the share that varies in the batches alone
ONE = "hadamard scaled:strength=one"  # likewise, for all layers of a model
METHODS = {  # method and layers
    "ours, all linear": (OURS, "all"),
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
FULL = {"full tuning": ("full", "all")}
STRENGTHS = {  # of the layers of a model, at rises that all of these reach
    f"{name}, {LAYERS[targets]}": (method, targets)
    for targets in ("all", "mlp")
    for name, method in {
        "one": ONE,
        "as calibrate": LIMITED,
        "no limit": "hadamard scaled:strength=F-1/2",
    }.items()
}
SHARES = {  # that vary: where they were measured
    "in the batches": (LIMITED, "all"),
    "in own text, too": (OURS, "all"),
}
BOTH_LAYERS = {"all linear": (LIMITED, "all"), "MLP": (LIMITED, "mlp")}
SMALL_RISES = 0.03, 0.05, 0.1
POWERS = {  # of the share that varies in the batches
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
SETTING = "model", "task", "targets", "seed"


def read(names: list[str]) -> list[dict]:
    """The rows that reached a finite loss, of a scaling of 20. Of equal runs what either measured;
    of what both did, the last."""
    runs: dict[tuple, dict] = {}
    for name in names:
        for row in read_rows(RESULTS / f"forgetting-{name}.jsonl"):
            run = runs.setdefault(identity(row), {})
            for key, value in row.items():
                run[key] = run.get(key, {}) | value if isinstance(value, dict) else value
    return [run for run in runs.values() if run["scaling"] == 20 and "forgetting" in run]


def of_one_task(rows: list[dict], steps: int = 40) -> list[dict]:
    """Neither mixed with own text nor followed by another task."""
    return selected(rows, steps=steps, then=None, mix=None)


def of_methods(
    rows: list[dict], methods: dict, cell: Callable, head: Callable = lambda *key: ""
) -> str:
    """A row per model and task, a column per method and its layers; `cell(rows, model, task)` is a
    loss or what was forgotten, by seeds."""
    found = []
    for model, task in EQUAL:
        if of_task := selected(rows, model=model, task=task):
            cells = [f"{MODELS[model]}, {task}{head(model, task)}"]
            for method, targets in methods.values():
                these = selected(of_task, method=method, targets=targets, r=32)
                cells.append(mean_cell(cell(these, model, task)))
            found.append(cells)
    return markdown(["", *methods], found)


def at_equal_forgetting(rows: list[dict], rise: float, methods: dict, text: str = "manual") -> str:
    measured = [row for row in rows if has_curve(row, text)]
    return of_methods(measured, methods, lambda these, *_: loss_by_seed(these, rise, text))


def rates(rows: list[dict]) -> str:
    """Of each method, and with how many seeds each."""
    found = []
    for model, task in EQUAL:
        cells = [f"{MODELS[model]}, {task}"]
        for method, targets in METHODS.values():
            setting = {"model": model, "task": task, "method": method, "targets": targets, "r": 32}
            seeds = Counter(row["lr"] for row in selected(rows, **setting))
            cells.append(", ".join(f"{lr:g} ({seeds[lr]})" for lr in sorted(seeds)))
        found.append(cells)
    return markdown(["", *METHODS], found)


def by_strength(rows: list[dict], rise: float) -> str:
    """At equal forgetting, of the seeds that have strengths as those of `calibrate`."""
    seeds = {tuple(row[name] for name in SETTING) for row in selected(rows, method=LIMITED)}
    mine = [row for row in rows if tuple(row[name] for name in SETTING) in seeds]
    return at_equal_forgetting(mine, rise, STRENGTHS)


def of_both(rows: list[dict], rise: float, methods: dict, text: str) -> str:
    """At equal forgetting, of the seeds that two methods have, at the rate that we recommend."""
    mine = [row for row in selected(rows, lr=RATE, r=32) if has_curve(row, text)]
    one, other = (
        {(row["model"], row["task"], row["seed"]) for row in selected(mine, method=m, targets=t)}
        for m, t in methods.values()
    )
    mine = [row for row in mine if (row["model"], row["task"], row["seed"]) in one & other]
    return at_equal_forgetting(mine, rise, methods, text)


def at_equal_loss(rows: list[dict], methods: dict, text: str = "manual") -> str:
    """Some rows have the manual alone at factors, so other texts leave them out."""
    return of_methods(
        [row for row in rows if has_curve(row, text)],
        methods,
        lambda these, *key: least_by_seed(these, EQUAL[key], text),
        lambda *key: f", {EQUAL[key]}",
    )


def by_power(rows: list[dict]) -> str:
    """Of q, v, o and down_proj at one rate, by seeds."""
    columns = [key for key in EQUAL if key[1] != "json"]
    found = []
    for name, method in POWERS.items():
        mine = selected(rows, method=method, targets="four", r=32, lr=RATE)
        cells = [
            seeds_cell(least_by_seed(selected(mine, model=model, task=task), EQUAL[model, task]))
            for model, task in columns
        ]
        found.append([name, *cells])
    return markdown(["", *(f"{MODELS[m]}, {task}, {EQUAL[m, task]}" for m, task in columns)], found)


def by_size(rows: list[dict]) -> str:
    """Spelling with seed 0 at one rate, by layers and r: forgetting at equal loss, and the loss
    and forgetting as trained."""
    heads = ["layers, r"]
    for model, name in MODELS.items():
        heads += [f"{name}, parameters", f"at {EQUAL[model, 'spelling']}", "as trained"]
    found = []
    usual = {"method": ONE, "task": "spelling", "seed": 0, "lr": RATE}
    for name, (targets, r) in SIZES.items():
        cells = [name]
        for model in MODELS:
            mine = selected(rows, **usual, model=model, targets=targets, r=r)
            cells.append(f"{mine[0]['parameters'] / 1e6:.2f} M" if mine else "")
            cells.append(seeds_cell(least_by_seed(mine, EQUAL[model, "spelling"])))
            cells.append(means(points(row)[0] for row in mine))
        found.append(cells)
    return markdown(heads, found)


def dial_and_rate(rows: list[dict]) -> str:
    """Ours: a lower rate as trained, and a higher one whose dW is scaled until it has the same
    loss."""
    found = []
    mine = selected(rows, method=LIMITED, r=32)
    for model, task, targets, seed in sorted({tuple(row[k] for k in SETTING) for row in mine}):
        of_rates = selected(mine, model=model, task=task, targets=targets, seed=seed)
        for low, high in pairwise(sorted(of_rates, key=lambda row: row["lr"])):
            loss, forgotten = points(low)[0]
            scaled = between(loss, sorted(points(high)))
            if scaled is not None:
                cells = [f"{MODELS[model]}, {task}, {LAYERS[targets]}", f"{seed}", f"{low['lr']:g}"]
                cells += [f"{loss:.3f}", f"{forgotten:.3f}", f"{high['lr']:g}: {scaled:.3f}"]
                found.append(cells)
    heads = ["", "seed", "rate", "loss", "forgot", "a higher rate, scaled, forgot"]
    return markdown(heads, found)


def runs(rows: list[dict]) -> str:
    """A row per method, kind of layers, r and rate, of one model, task and number of steps."""
    heads = ["method", "layers", "r", "rate", "as trained", *(f"x {f}" for f in FACTORS)]
    heads += ["code, prose", "meter", "chat; agreement", "seeds"]
    found = []
    for mine in by_setting(rows):
        cells = named(mine[0])
        curves = [points(row) for row in mine]
        for i in range(1 + len(FACTORS)):
            cells.append(means(curve[i] for curve in curves if len(curve) > i))
        of_texts = [[row["forgetting"].get(text) for row in mine] for text in ("code", "prose")]
        cells.append(", ".join(f"{statistics.fmean(of):.3f}" for of in of_texts if None not in of))
        cells.append(means((row["meter"],) for row in mine if "meter" in row))
        cells.append(means((row["chat"], row["agreement"]) for row in mine if "chat" in row))
        found.append([*cells, str(len(mine))])
    return markdown(heads, found)


def skills(rows: list[dict]) -> str:
    """One task after the other: the share of right answers, of spelling the errors per phoneme, and
    the held-out loss of both; and what was forgotten in the end."""
    heads = ["first, second", "method", "layers", "r", "rate", "first", "first, after the second"]
    heads += ["second", "meter", "manual", "seeds"]
    found = []
    for mine in by_setting([row for row in rows if "then" in row]):
        first, second = mine[0]["task"], mine[0]["then"]
        head = f"{MODELS[mine[0]['model']]}, {first}, {second}, {mine[0]['steps']} steps"
        shown = [(first, 0), (first, 1), (second, 1)]
        cells = [means(_told(row["skills"][task][stage]) for row in mine) for task, stage in shown]
        cells += [means([(row["meter"],) for row in mine])]
        cells += [means([(row["forgetting"]["manual"],) for row in mine]), str(len(mine))]
        found.append([head, *named(mine[0]), *cells])
    return markdown(heads, found)


def _told(skill: dict) -> tuple[float, float]:
    return skill.get("phoneme_errors", skill["right"]), skill["held_out_loss"]


def mixing(rows: list[dict]) -> str:
    """Runs with rows of own text mixed in, and those without of the same setting and seeds."""
    heads = ["", "method", "layers", "r", "rate", "own rows", "loss; manual", "meter", "s/step"]
    found = []
    for mixed in by_setting([row for row in rows if "mix" in row]):
        same = {identity({**row, "mix": None}) for row in mixed}
        head = f"{MODELS[mixed[0]['model']]}, {mixed[0]['task']}, {mixed[0]['steps']} steps"
        plain = [row for row in rows if identity(row) in same]
        for name, these in (("none", plain), (f"1 of {mixed[0]['mix']}", mixed)):
            cells = [means(points(row)[0] for row in these)]
            cells.append(means((row["meter"],) for row in these if "meter" in row))
            cells.append(means((row["seconds_per_step"],) for row in these))
            found.append([head, *named(mixed[0]), name, *cells])
    return markdown(heads, found)


def print_more(rows: list[dict]) -> None:
    """What rows of more than 40 steps, of two tasks and with own text mixed in tell."""
    for steps in sorted({row["steps"] for row in rows} - {40}):
        these = of_one_task(rows, steps)
        for text, rises in RISES.items():
            for rise in rises:
                print(f"{steps} steps: held-out loss at a rise of {rise} on {text}\n")
                print(at_equal_forgetting(these, rise, METHODS | OTHERS | FULL, text))
    print("one task after the other: wrong or right answers; held-out loss\n")
    print(skills(rows))
    print("own text mixed in\n")
    print(mixing(rows))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+")
    rows = read(parser.parse_args(arguments).names)
    usual = of_one_task(rows)
    for methods in (METHODS, OTHERS):
        for text, rises in RISES.items():
            for rise in rises:
                print(f"held-out loss at a rise of {rise} on {text}\n")
                print(at_equal_forgetting(usual, rise, methods, text))
        for text in ("manual", "code", "prose", "chat"):
            print(f"what was forgotten of {text} at equal loss\n")
            print(at_equal_loss(usual, methods, text))
    print("rates, and with how many seeds\n")
    print(rates(usual))
    for text, rise in (("manual", 0.03), ("manual", 0.1), ("prose", 0.1), ("meter", 0.2)):
        print(f"the share that varies: held-out loss at a rise of {rise} on {text}\n")
        print(of_both(usual, rise, SHARES, text))
    for text, rise in (("manual", 0.03), ("manual", 0.1), ("meter", 0.2)):
        print(f"layers: held-out loss at a rise of {rise} on {text}, at one rate\n")
        print(of_both(usual, rise, BOTH_LAYERS, text))
    for rise in SMALL_RISES:
        print(f"strengths of the layers: held-out loss at a rise of {rise} on the manual\n")
        print(by_strength(usual, rise))
    print("by the power p\n")
    print(by_power(usual))
    print("by layers and r\n")
    print(by_size(usual))
    print("the dial and a lower rate\n")
    print(dial_and_rate(usual))
    print_more(rows)
    for model, task, steps in dict.fromkeys((r["model"], r["task"], r["steps"]) for r in rows):
        print(f"{model}, {task}, {steps} steps\n")
        print(runs(selected(of_one_task(rows, steps), model=model, task=task)))
    print("rank correlation of the meter with the rise of the loss on a text\n")
    print(correlations(rows))
    print("rank correlation of the meter with what was lost of a first task\n")
    print(correlations_of_skills(rows))
    print("rank correlation of KL on the task with the rise of the loss on the manual\n")
    print(correlations_of_the_task(rows))


if __name__ == "__main__":
    main()
