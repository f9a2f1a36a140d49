"""Tables of docs/ablations.md, ours against variants of itself, from the rows of finetune.py.

    python benchmarks/ablations.py          of the stored rows, results/forgetting.jsonl
    python benchmarks/ablations.py FILE     of others

forgetting.py says how values are read off.
"""

from functools import partial
from itertools import pairwise

from forgetting_curves import (
    between,
    forgot,
    has_curve,
    least_by_seed,
    points,
    selected,
)
from forgetting_tables import (
    EQUAL,
    LAYERS,
    MODELS,
    OURS,
    TEXTS,
    Methods,
    by_task,
    loss_cell,
    markdown,
    means,
    of_one_task,
    rows_named,
    seeds_cell,
    shown,
)

LIMITED = "hadamard scaled:strength=limited"  # by the share that varies in the batches alone
ONE = "hadamard scaled:strength=one"  # likewise, for all layers of a model
RATE = 1e-3  # which we recommend
RATES = 7e-4, RATE, 1.5e-3
SHARES = {"batches": (LIMITED, "all"), "own text, too": (OURS, "all")}  # where it was measured
BOTH_LAYERS = {"all linear": (OURS, "all"), "MLP": (OURS, "mlp")}
READ = {  # what calibrate reads
    "four batches of the task": LIMITED,
    "the same, each as one row of some 230 tokens": "hadamard scaled:on=long strength=limited",
    "the model's own text, 8 rows of 128 tokens": "hadamard scaled:on=own strength=limited",
}
POWERS = {  # of the share that varies in the batches
    "p = 0": "hadamard scaled:p=0",
    "p = 1": "hadamard scaled:p=1",
    "p = 2": ONE,
    "p = 4": "hadamard scaled:p=4",
}
SIZES = {  # layers and r
    "MLP, 64": ("mlp", 64),
    "MLP, 32": ("mlp", 32),
    "MLP, 16": ("mlp", 16),
    "q, v, o, down, 32": ("four", 32),
    "all linear, 64": ("all", 64),
    "all linear, 32": ("all", 32),
}


def side_by_side(
    rows: list[dict], methods: Methods, rises: list[tuple[str, float]], **setting
) -> str:
    """At equal forgetting of each text, of the seeds that all of these methods have."""

    def cell(name: str, text: str, rise: float, these: list[dict]) -> str:
        mine = [row for row in selected(these, r=32, **setting) if has_curve(row, text)]
        runs = {
            each: selected(mine, method=method, targets=targets)
            for each, (method, targets) in methods.items()
        }
        shared = set.intersection(*({row["seed"] for row in of} for of in runs.values()))
        return loss_cell([row for row in runs[name] if row["seed"] in shared], rise, text)

    columns = {
        f"{TEXTS[text]} {rise}: {name}": partial(cell, name, text, rise)
        for text, rise in rises
        for name in methods
    }
    return by_task(rows, columns)


def by_text_read(rows: list[dict]) -> str:
    """SmolLM2's spelling, all linear layers, seed 0, as trained."""
    usual = {"model": "fp32", "task": "spelling", "targets": "all", "r": 32, "lr": RATE, "seed": 0}
    found = []
    for name, method in READ.items():
        for row in selected(rows, method=method, **usual):
            forgotten = [f"{forgot(row, text):.3f}" for text in TEXTS]
            found.append([name, f"{row['held_out_loss']:.3f}", *forgotten])
    return markdown(["read", "loss", *TEXTS.values()], found)


def by_rate(rows: list[dict]) -> str:
    """Loss and forgetting as trained, and the loss at equal forgetting, at each rate."""

    def as_trained(lr: float, these: list[dict]) -> str:
        return means(points(row)[0] for row in selected(these, lr=lr))

    def at_rise(lr: float, rise: float, these: list[dict]) -> str:
        return loss_cell(selected(these, lr=lr), rise)

    columns = {}
    for lr in RATES:
        columns[f"{shown(lr)}: as trained"] = partial(as_trained, lr)
        for rise in (0.03, 0.1):
            columns[f"{shown(lr)}: at {rise}"] = partial(at_rise, lr, rise)
    return by_task(selected(rows, method=OURS, targets="all", r=32), columns)


def by_power(rows: list[dict]) -> str:
    """Of q, v, o and down_proj at one rate, what each seed had forgotten at equal loss."""

    def cell(method: str, these: list[dict]) -> str:
        mine = selected(these, method=method)
        loss = EQUAL[mine[0]["model"], mine[0]["task"]] if mine else 0.0
        return seeds_cell(least_by_seed(mine, loss))

    columns = {name: partial(cell, method) for name, method in POWERS.items()}
    mine = selected(rows, targets="four", r=32, lr=RATE)
    return by_task(mine, columns, lambda *key: f", {EQUAL[key]}")


def by_size(rows: list[dict]) -> str:
    """Spelling with seed 0 at one rate, by layers and r: forgetting at equal loss, and the loss
    and forgetting as trained."""
    heads = ["layers, r"]
    for model, name in MODELS.items():
        at = f"forgotten at {EQUAL[model, 'spelling']}"
        heads += [f"{name}: trained", at, "as trained"]
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
    """A lower rate as trained, and a higher one whose dW is scaled until it has the same loss: that
    loss, and what both had forgotten, means over the seeds."""

    def cell(low: float, high: float, these: list[dict]) -> str:
        found = []
        for run in selected(these, lr=low):
            loss, forgotten = points(run)[0]
            for other in selected(these, lr=high, seed=run["seed"]):
                scaled = between(loss, sorted(points(other)))
                if scaled is not None:
                    found.append((loss, forgotten, scaled))
        return f"{means(found)} ({len(found)})" if found else ""

    columns = {
        f"{shown(low)}: loss; forgot; {shown(high)}, scaled, forgot": partial(cell, low, high)
        for low, high in pairwise(RATES)
    }
    return by_task(selected(rows, method=OURS, targets="all", r=32), columns)


def main(arguments: list[str] | None = None) -> None:
    rows = of_one_task(rows_named(arguments, __doc__.splitlines()[0]))
    of_rates = [row for row in rows if row["lr"] in RATES]
    of_manual = [("manual", 0.1), ("manual", 0.03)]
    print("the share that varies: held-out loss at rises of texts\n")
    print(side_by_side(rows, SHARES, [*of_manual, ("meter", 0.2)], lr=RATE))
    print("layers: held-out loss at rises of texts\n")
    print(side_by_side(of_rates, BOTH_LAYERS, [*of_manual, ("meter", 0.2)]))
    for targets in ("all", "mlp"):
        strengths = {"one": (ONE, targets), "by `calibrate`": (OURS, targets)}
        print(f"strengths, {LAYERS[targets]}: held-out loss at rises of texts\n")
        print(side_by_side(of_rates, strengths, of_manual))
    print("by what calibrate reads\n")
    print(by_text_read(rows))
    print("by the rate\n")
    print(by_rate(rows))
    print("by the power p: what was forgotten at equal loss\n")
    print(by_power(rows))
    print("by layers and r\n")
    print(by_size(rows))
    print("the dial and a lower rate\n")
    print(dial_and_rate(rows))


if __name__ == "__main__":
    main()
