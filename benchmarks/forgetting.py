"""Tables of docs/density.md from the rows of finetune.py: what was forgotten at equal loss.

    python benchmarks/forgetting.py zen5 xeon-spr     reads results/forgetting-{zen5,xeon-spr}.jsonl

The first table is at equal loss: it interpolates the logarithm of what was forgotten on Python's
manual over the held-out loss, for each seed, between factors of dW at each rate and between rates;
the least counts, or that of a run that learned more. In the others a cell has loss and forgetting,
means over the seeds, of which the last column tells the number.
"""

import argparse
import json
import math
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
METHODS = {  # method and layers; vectors of another size act as another rate
    "calibrated, MLP alone": (["hadamard scaled"], "mlp"),
    "calibrated": (["hadamard scaled", "hadamard scaled:p=2 unit=0"], "four"),
    "calibrated, all linear": (["hadamard scaled"], "all"),
    "p = 0, by size alone": (["hadamard scaled:p=0", "hadamard scaled:p=0 unit=0"], "four"),
    "p = 1": (["hadamard scaled:p=1"], "four"),
    "p = 4": (["hadamard scaled:p=4"], "four"),
    "not calibrated": (["hadamard"], "four"),
    "SHiRA, MLP alone": (["shira"], "mlp"),
    "SHiRA": (["shira"], "four"),
    "SHiRA, all linear": (["shira"], "all"),
    "LoRA, MLP alone": (["lora"], "mlp"),
    "LoRA": (["lora"], "four"),
    "LoRA, all linear": (["lora"], "all"),
    "OFT, MLP alone": (["oft"], "mlp"),
    "OFT": (["oft"], "four"),
}


def read(names: list[str]) -> list[dict]:
    """The rows that reached a finite loss, of 40 steps and a scaling of 20."""
    texts = [(RESULTS / f"forgetting-{name}.jsonl").read_text() for name in names]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    return [r for r in rows if r["steps"] == 40 and r["scaling"] == 20 and "forgetting" in r]


def curves(rows: list[dict]) -> list[list[tuple[float, float]]]:
    """Loss and forgetting of one method and seed: by factors of dW for each rate, and by rates."""
    by_rate = [(row["held_out_loss"], row["forgetting"]["manual"]) for row in rows]
    found = [by_rate]
    for row, trained in zip(rows, by_rate, strict=True):
        after = [row[f"x {factor}"] for factor in FACTORS if f"x {factor}" in row]
        found.append([trained, *((each["held_out_loss"], each["manual"]) for each in after)])
    return [sorted(points) for points in found]


def at(loss: float, points: list[tuple[float, float]]) -> list[float]:
    """What those that learned at least as much forgot, and what lies between two neighbours."""
    found = [forgot for own, forgot in points if own <= loss]
    for (low, more), (high, less) in pairwise(points):
        if low <= loss < high and more > 0 and less > 0:
            share = (loss - low) / (high - low)
            found.append(math.exp((1 - share) * math.log(more) + share * math.log(less)))
    return found


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


def at_equal_loss(rows: list[dict]) -> str:
    """A row per method and kind of layers, a column per model and task; means, then seeds."""
    heads = [f"{MODELS[model]}, {task}, {loss}" for (model, task), loss in EQUAL.items()]
    lines = [f"| | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    for name, (methods, targets) in METHODS.items():
        cells = []
        for (model, task), loss in EQUAL.items():
            mine = [
                row
                for row in rows
                if (row["model"], row["task"], row["targets"], row["r"])
                == (model, task, targets, 32)
                and row["method"] in methods
            ]
            least, seeds = [], sorted({row["seed"] for row in mine})
            for seed in seeds:
                own = curves([row for row in mine if row["seed"] == seed])
                if found := [value for points in own for value in at(loss, points)]:
                    least.append(min(found))
            if least:
                of = "" if len(least) == len(seeds) else f" of {len(seeds)}"
                cells.append(f"{statistics.fmean(least):.3f} ({len(least)}{of})")
            else:
                cells.append("not reached" if mine else "")
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ranks(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return [float(order.index(i)) for i in range(len(values))]


def correlations(rows: list[dict]) -> str:
    """Spearman's rank correlation of KL on the task with forgetting, by model and task."""
    lines = []
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in rows if "kl" in row):
        mine = [r for r in rows if (r["model"], r["task"]) == (model, task) and "kl" in r]
        trained = [(row["kl"], row["forgetting"]["manual"]) for row in mine]
        scaled = [(row[f"x {f}"]["kl"], row[f"x {f}"]["manual"]) for row in mine for f in FACTORS]
        for name, pairs in (("as trained", trained), ("and scaled", trained + scaled)):
            if len(pairs) > 3:
                kl, forgot = (ranks(list(values)) for values in zip(*pairs, strict=True))
                value = statistics.correlation(kl, forgot)
                lines.append(f"{model}, {task}, {name}: {value:.2f} over {len(pairs)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+")
    rows = read(parser.parse_args().names)
    print(at_equal_loss(rows))
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in rows):
        print(table(rows, model, task))
    print("rank correlation of KL(base, tuned) on the task with forgetting")
    print(correlations(rows))


if __name__ == "__main__":
    main()
