"""Tables of docs/evidence.md from the rows of finetune.py.

    python benchmarks/forgetting.py          of the stored rows, results/forgetting.jsonl
    python benchmarks/forgetting.py FILE     of others

At equal forgetting means: the held-out loss is interpolated over the logarithm of what was
forgotten, for each seed, between factors of dW at each rate; the lowest counts, or that of a run
that forgot less. At equal loss means: the logarithm of what was forgotten is interpolated over the
held-out loss, between factors and between rates; the least counts, or that of a run that learned
more. Where nothing or less was forgotten, a straight line takes the place of that over logarithms.
A cell is a mean over the seeds, whose number stands in parentheses or in the last column.
"""

import statistics
from collections import Counter
from functools import partial

from finetune_rows import FACTORS, identity
from forgetting_correlations import correlations, correlations_of_skills, correlations_of_the_task
from forgetting_curves import at, at_factor, has_curve, least_by_seed, points, selected
from forgetting_tables import (
    EQUAL,
    LAYERS,
    MODELS,
    OURS,
    TEXTS,
    Methods,
    at_equal_forgetting,
    by_setting,
    by_task,
    markdown,
    mean_cell,
    means,
    of_methods,
    of_one_task,
    rows_named,
    shown,
)

RISES = {
    "manual": (0.1, 0.03, 0.3),
    "code": (0.1,),
    "prose": (0.1,),
    "meter": (0.2, 0.1, 0.3),
    "chat": (0.1, 0.2),
}
METHODS = {
    "ours, all linear": (OURS, "all"),
    "SHiRA, MLP": ("shira", "mlp"),
    "OFT, MLP": ("oft", "mlp"),
    "LoRA, MLP": ("lora", "mlp"),
}
OTHERS = {
    "SHiRA, all linear": ("shira", "all"),
    "OFT, all linear": ("oft", "all"),
    "LoRA, all linear": ("lora", "all"),
}
CALIBRATED = {"calibrated": (OURS, "all"), "not calibrated": ("hadamard", "all")}
WITH_VECTORS = {  # and strengths that calibrate measures
    "ours": (OURS, "mlp"),
    "SHiRA with vectors": ("shira scaled", "mlp"),
    "SHiRA": ("shira", "mlp"),
    "LoRA with vectors": ("lora scaled", "mlp"),
    "LoRA": ("lora", "mlp"),
}
LONG = METHODS | {"full tuning": ("full", "all")}  # methods of trainings of more than 40 steps
LONG_FACTORS = 1, 0.7  # of dW
CHAT_LOSSES = (
    ("spelling", 1.23),
    ("spelling", 1.43),
    ("roman", 1.3),
    ("dates", 1.385),
    ("json", 0.025),
    ("json", 0.015),
    ("spelling-in-chat", 0.9),
    ("spelling-in-chat", 1.2),
)


def at_equal_loss(rows: list[dict], methods: Methods, text: str = "manual") -> str:
    """Some rows have the manual alone at factors, so other texts leave them out."""

    def cell(these: list[dict]) -> str:
        loss = EQUAL[these[0]["model"], these[0]["task"]] if these else 0.0
        return mean_cell(least_by_seed(these, loss, text))

    measured = [row for row in rows if has_curve(row, text)]
    return by_task(measured, of_methods(methods, cell), lambda *key: f", {EQUAL[key]}")


def rates(rows: list[dict]) -> str:
    """Of each method, and with how many seeds each."""

    def cell(these: list[dict]) -> str:
        seeds = Counter(row["lr"] for row in these)
        return ", ".join(f"{shown(lr)} ({seeds[lr]})" for lr in sorted(seeds))

    return by_task(rows, of_methods(METHODS, cell))


def as_trained(rows: list[dict]) -> str:
    """Of one task: what each method had learned, and what it had forgotten of every text, as
    trained and with less of dW."""
    found = []
    for name, (method, targets) in LONG.items():
        of_method = selected(rows, method=method, targets=targets)
        for lr in sorted({row["lr"] for row in of_method}):
            runs = selected(of_method, lr=lr)
            for factor in LONG_FACTORS:
                first = [name, shown(lr)] if factor == 1 else [f"the same, times {factor}", ""]
                cells = [means((at_factor(row, factor)[0],) for row in runs)]
                for text in TEXTS:
                    forgotten = [at_factor(row, factor, text)[1] for row in runs]
                    cells.append("" if None in forgotten else f"{statistics.fmean(forgotten):.3f}")
                found.append([*first, *cells, str(len(runs))])
    return markdown(["", "rate", "loss", *TEXTS.values(), "seeds"], found)


def beside_ours(rows: list[dict]) -> str:
    """Of one task: at the loss of each other method as trained and with less of dW, how many times
    as much it had forgotten of every text as ours at the best of its rates."""
    found = []
    ours = selected(rows, method=OURS, targets="all")
    seeds = {row["seed"] for row in ours}
    for name, (method, targets) in LONG.items():
        if method == OURS:
            continue
        of_method = selected(rows, method=method, targets=targets)
        of_method = [row for row in of_method if row["seed"] in seeds]
        for lr in sorted({row["lr"] for row in of_method}):
            runs = selected(of_method, lr=lr)
            for factor in LONG_FACTORS:
                cells = [f"{name}, {shown(lr)}" + ("" if factor == 1 else f", times {factor}")]
                cells.append(means((at_factor(row, factor)[0],) for row in runs))
                for text in TEXTS:
                    pairs = [with_ours(row, ours, factor, text) for row in runs]
                    cells.append("" if any(None in pair for pair in pairs) else times(pairs))
                if any(cells[2:]):
                    found.append([*cells, str(len(runs))])
    return markdown(["", "loss", *TEXTS.values(), "seeds"], found)


def times(pairs: list[tuple[float, float]]) -> str:
    """The ratio of the means of two columns, and the means; no ratio of what is no loss."""
    other, ours = (statistics.fmean(column) for column in zip(*pairs, strict=True))
    ratio = f"{other / ours:.1f} " if min(other, ours) > 0 else ""
    return f"{ratio}({other:.3f}, {ours:.3f})"


def with_ours(
    row: dict, ours: list[dict], factor: float, text: str
) -> tuple[float | None, float | None]:
    """What a run had forgotten, and the least that runs of ours had with its seed at its loss."""
    loss, forgotten = at_factor(row, factor, text)
    seed = row["seed"]
    return forgotten, least_by_seed(selected(ours, seed=seed), loss, text)[seed]


def in_chat(rows: list[dict]) -> str:
    """Of SmolLM2, means over the seeds that all methods have: KL on answers, and how often the
    likeliest token is the same."""

    def cell(loss: float, text: str, these: list[dict]) -> str:
        best = max if text == "agreement" else min
        of_seeds = {}
        for seed in sorted({row["seed"] for row in these}):
            curves = [sorted(points(row, text)) for row in selected(these, seed=seed)]
            values = [value for curve in curves for value in at(loss, curve)]
            of_seeds[seed] = best(values, default=None)
        return mean_cell(of_seeds)

    found = []
    for task, loss in CHAT_LOSSES:
        mine = [row for row in selected(rows, model="fp32", task=task) if has_curve(row, "chat")]
        by_method = [
            {row["seed"] for row in selected(mine, method=method, targets=targets)}
            for method, targets in METHODS.values()
        ]
        shared = set.intersection(*by_method)
        mine = [row for row in mine if row["seed"] in shared]
        for head, text in (("KL", "chat"), ("the same likeliest token", "agreement")):
            columns = of_methods(METHODS, partial(cell, loss, text))
            cells = [of(mine) for of in columns.values()]
            found.append([f"{task}, at a loss of {loss}: {head}", *cells])
    return markdown(["", *METHODS], found)


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


def named(row: dict) -> list[str]:
    return [row["method"], LAYERS[row["targets"]], str(row["r"]), shown(row["lr"])]


def skills(rows: list[dict], first: str, second: str) -> str:
    """One task after the other: right answers, held-out loss and, of spelling, errors per phoneme;
    and what was forgotten in the end."""
    found = []
    for name, (method, targets) in LONG.items():
        for mine in by_setting(selected(rows, method=method, targets=targets)):
            cells = [name, shown(mine[0]["lr"])]
            for task, stage in ((first, 0), (first, 1), (second, 1)):
                cells.append(skill([row["skills"][task][stage] for row in mine]))
            cells.append(means((row["forgetting"]["manual"],) for row in mine))
            cells.append(means((row["meter"],) for row in mine))
            found.append([*cells, str(len(mine))])
    heads = ["", "rate", f"{first}, right after", f"{first}, after {second}", second]
    return markdown([*heads, "manual", "own text", "seeds"], found)


def skill(of_seeds: list[dict]) -> str:
    right, loss = (
        statistics.fmean(each[name] for each in of_seeds) for name in ("right", "held_out_loss")
    )
    told = f"{right:.0%}; {loss:.3f}"
    if all("phoneme_errors" in each for each in of_seeds):
        told += f"; {statistics.fmean(each['phoneme_errors'] for each in of_seeds):.0%}"
    return told


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


def print_long(rows: list[dict]) -> None:
    """What trainings of more than 40 steps, of one task and of two, tell."""
    long = [row for row in rows if row["steps"] > 40 and "mix" not in row]
    for model, task, steps in dict.fromkeys((r["model"], r["task"], r["steps"]) for r in long):
        these = selected(of_one_task(long, steps), model=model, task=task)
        if these:
            name = f"{MODELS[model]}, {task}, {steps} steps"
            print(f"{name}: as trained\n\n{as_trained(these)}")
            print(f"{name}: times as much forgotten as ours at the same loss\n")
            print(beside_ours(these))
    of_two = [row for row in long if "then" in row]
    settings = dict.fromkeys((r["model"], r["task"], r["then"], r["steps"]) for r in of_two)
    for model, first, second, steps in settings:
        print(f"{MODELS[model]}, {first}, then {second}, {steps} steps each\n")
        these = selected(of_two, model=model, task=first, then=second, steps=steps)
        print(skills(these, first, second))


def main(arguments: list[str] | None = None) -> None:
    rows = rows_named(arguments, __doc__.splitlines()[0])
    usual = of_one_task(rows)
    for of, methods in ("", METHODS), ("of others, ", OTHERS):
        for text, rises in RISES.items():
            for rise in rises:
                print(f"{of}held-out loss at a rise of {rise} on {TEXTS[text]}\n")
                print(at_equal_forgetting(usual, rise, methods, text))
        for text in ("manual", "code", "prose", "chat"):
            print(f"{of}what was forgotten of {TEXTS[text]} at equal loss\n")
            print(at_equal_loss(usual, methods, text))
    spelling = selected(usual, model="fp32", task="spelling")
    print("bases or vectors: held-out loss at a rise of 0.1 on manual\n")
    print(at_equal_forgetting(spelling, 0.1, WITH_VECTORS))
    print("bases or vectors: what was forgotten of manual at equal loss\n")
    print(at_equal_loss(spelling, WITH_VECTORS))
    of_both_models = selected(usual, task="spelling")
    print("with and without calibration: held-out loss at a rise of 0.1 on manual\n")
    print(at_equal_forgetting(of_both_models, 0.1, CALIBRATED))
    print("with and without calibration: what was forgotten of manual at equal loss\n")
    print(at_equal_loss(of_both_models, CALIBRATED))
    print("rates, and with how many seeds\n")
    print(rates(usual))
    print_long(rows)
    print("answers in chat\n")
    print(in_chat(usual))
    print("own text mixed in\n")
    print(mixing(rows))
    print("rank correlation of the meter with the rise of the loss on a text\n")
    print(correlations(rows))
    print("rank correlation of the meter with what was lost of a first task\n")
    print(correlations_of_skills(rows))
    print("rank correlation of KL on the task with the rise of the loss on the manual\n")
    print(correlations_of_the_task(rows))
    for model, task, steps in dict.fromkeys((r["model"], r["task"], r["steps"]) for r in rows):
        print(f"{MODELS[model]}, {task}, {steps} steps: all runs\n")
        print(runs(selected(of_one_task(rows, steps), model=model, task=task)))


if __name__ == "__main__":
    main()
