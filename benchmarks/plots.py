"""Draws the figures of README.md and docs/ from benchmarks/results.

    python benchmarks/plots.py        all of `FIGURES`, into docs/figures

Of layers only float32 rows are drawn, so that no line mixes types.
"""

import argparse
import hashlib
import json
from pathlib import Path

import matplotlib
from forgetting_curves import loss_by_seed
from forgetting_tables import OURS, of_one_task, read
from methods import density_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import (  # noqa: E402
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullLocator,
    StrMethodFormatter,
)

ROOT = Path(__file__).parent
# The share of dW's full rank, 1 - (1 - density)^r, is for r = 32 and 1024 to 4096 features.
DENSITIES = {
    "hadamard": ("tab:red", "Hadamard (full rank)"),
    "1/3": ("tab:blue", "1/3 (full rank)"),
    "0.07": ("tab:orange", "0.07 (90% of full rank)"),
    "very_sparse": ("tab:green", "very_sparse (40 to 64%)"),
}
RATIO = "time of a step / frozen layer's"


def float32_rows(result: dict) -> list[dict]:
    return [row for row in result["rows"] if row["dtype"] == "float32"]


def with_conditions(figure, result: dict):
    """Adds, in small print, what the figure was measured with."""
    m = result["machine"]
    text = (
        f"float32, r = 32, medians; {m['cpu']}, {m['threads']} threads, {m['isa']}, "
        f"torch {m['torch']}, PEFT {m['peft']}, commit {m['commit']}, {m['date'][:10]}"
    )
    figure.tight_layout(rect=(0, 0.045, 1, 0.88 if figure.legends else 1))
    figure.text(0.5, 0.012, text, ha="center", fontsize=7, color="0.35")
    return figure


def by_tokens(result: dict):
    """LoRA, PEFT and ours against the number of tokens, one panel per layer size."""
    rows = [row for row in float32_rows(result) if row.get("rank", 32) == 32]
    counts = {(r["in"], r["out"]): {o["tokens"] for o in rows if o["in"] == r["in"]} for r in rows}
    sizes = sorted(size for size in counts if size[0] == size[1] and len(counts[size]) > 1)
    figure, axes = plt.subplots(1, len(sizes), figsize=(9, 3.9), sharey=True, squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        mine = sorted((r for r in rows if (r["in"], r["out"]) == size), key=lambda r: r["tokens"])

        def draw(density: str, column: str, axis=axis, mine=mine, **style) -> None:
            line = [
                (r["tokens"], r[column]) for r in mine if r["density"] == density and column in r
            ]
            axis.plot(*zip(*line, strict=True), **style)

        for density, (color, label) in DENSITIES.items():
            if any(row["density"] == density for row in mine):
                draw(density, "ours", color=color, marker="o", markersize=4, label=f"ours, {label}")
        # PEFT's and LoRA's times do not depend on the density: those of one are drawn.
        others = {"peft": (":", "RandLoRA in PEFT"), "lora": ("--", "LoRA")}
        for column, (style, label) in others.items():
            if density := next((row["density"] for row in mine if column in row), None):
                draw(density, column, color="k", linestyle=style, label=label)
        axis.set(xscale="log", yscale="log", title=f"{size[0]} x {size[1]}", xlabel="tokens")
        # Powers of four, whatever was measured: labels at every count would overlap.
        axis.xaxis.set_major_locator(LogLocator(4))
        axis.yaxis.set_major_locator(FixedLocator([1, 1.5, 2, 3, 5, 8, 12]))
        for one in (axis.xaxis, axis.yaxis):
            one.set_minor_locator(NullLocator())
            one.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(RATIO)
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, ncols=3, loc="upper center", fontsize=8)
    return with_conditions(figure, result)


def by_density(result: dict):
    """Ours and LoRA against the density, at one size."""
    rows = float32_rows(result)
    figure, axis = plt.subplots(figsize=(9, 3.8))
    counts = sorted({r["tokens"] for r in rows})
    for tokens, color in zip(counts, ("tab:blue", "tab:orange", "tab:green"), strict=False):
        mine = [r for r in rows if r["tokens"] == tokens]
        line = sorted((density_of(r["density"], min(r["in"], r["out"])), r["ours"]) for r in mine)
        axis.plot(*zip(*line, strict=True), "o-", color=color, label=f"ours, {tokens} tokens")
        lora = sorted(r["lora"] for r in mine)[len(mine) // 2]
        axis.axhline(lora, linestyle="--", color=color, alpha=0.7, label=f"LoRA, {tokens} tokens")
    densities = sorted({density_of(r["density"], min(r["in"], r["out"])) for r in rows})
    axis.set(xscale="log", xlabel="density of the bases", ylabel=RATIO)
    axis.set_title(f"{rows[0]['in']} x {rows[0]['out']}")
    axis.set_xticks(densities, [f"{density:.2g}" for density in densities])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return with_conditions(figure, result)


FRONTS = {  # method and layers; solid lines are those that each method is recommended with
    (OURS, "all"): ("tab:red", "-", "ours, all linear layers"),
    ("shira", "mlp"): ("tab:green", "-", "SHiRA, MLP"),
    ("oft", "mlp"): ("tab:purple", "-", "OFT, MLP"),
    ("lora", "mlp"): ("k", "-", "LoRA, MLP"),
}
MODEL_NAMES = {"fp32": "SmolLM2-135M", "gemma": "Gemma 3 270M"}


def front(rows: list[dict]) -> list[tuple[float, float]]:
    """What was forgotten, and the lowest held-out loss there, a mean over the seeds: where all of
    them have one, up to what the worst run forgot."""
    points = []
    most = max(row["forgetting"]["manual"] for row in rows)
    for rise in (0.01 * 300 ** (i / 59) for i in range(60)):
        if rise > most:
            break
        losses = loss_by_seed(rows, rise).values()
        if all(loss is not None for loss in losses):
            points.append((rise, sum(losses) / len(losses)))
    return points


def by_forgetting(rows: list[dict], tasks=("spelling", "roman", "dates", "json")):
    """Of each method the lowest held-out loss over what was forgotten; the table of README and
    docs/evidence.md is read off at 0.1."""
    rows = [row for row in of_one_task(rows) if row["r"] == 32 and "x 0.7" in row]
    size = (11, 6.4) if len(tasks) > 1 else (9, 3.6)
    panels = [(model, task) for model in MODEL_NAMES for task in tasks]
    shape = (2, len(tasks)) if len(tasks) > 1 else (1, 2)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False)
    for axis, (model, task) in zip(axes.flat, panels, strict=True):
        for (method, targets), (color, line, label) in FRONTS.items():
            mine = [
                row
                for row in rows
                if (row["model"], row["task"], row["method"], row["targets"])
                == (model, task, method, targets)
            ]
            if points := mine and front(mine):
                axis.plot(*zip(*points, strict=True), color=color, linestyle=line, label=label)
        axis.axvline(0.1, color="0.7", linewidth=0.8, zorder=0)
        axis.set(xscale="log", xlim=(0.009, 3.3), title=f"{MODEL_NAMES[model]}, {task}")
        axis.xaxis.set_major_locator(FixedLocator([0.01, 0.03, 0.1, 0.3, 1, 3]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_major_locator(MaxNLocator(4))
        axis.grid(alpha=0.3)
    for row_of_axes in axes:
        row_of_axes[0].set_ylabel("held-out loss")
    figure.supxlabel("rise of the loss on Python's manual", fontsize="medium")
    found = {}
    for axis in axes.flat:
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, line)
    figure.legend(found.values(), found.keys(), ncols=5, loc="upper center", fontsize=8)
    figure.tight_layout(rect=(0, -0.03, 1, 0.93))
    return figure


def of_spelling(rows: list[dict]):
    """The same of one task, for README."""
    return by_forgetting(rows, tasks=("spelling",))


# Whose dW `by_inputs` looks at: not calibrated, by size alone, and by what varies in the batches.
SCALED_INPUTS = ("hadamard", "hadamard scaled:p=0", "hadamard scaled:strength=one")
USUAL = {"model": "fp32", "task": "spelling", "targets": "four", "steps": 40, "r": 32}


def by_inputs(inputs: dict, rows: list[dict]):
    """The mean's share of the inputs' energy, and of dW's response: before and after."""
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    looks = [("0.6", "as they are"), ("tab:orange", "divided by their size alone")]
    looks.append(("tab:red", "and weighed by what varies"))
    shares = [
        [inputs["manual"][k][name] for k in targets] for name in ("mean", "scaled", "calibrated")
    ]
    responses = []
    for method in SCALED_INPUTS:
        mine = [r["common"] for r in rows if USUAL.items() <= r.items() and r["method"] == method]
        responses.append([sum(c[layer] for c in mine) / len(mine) for layer in targets])
    titles = (
        "the mean's share of the inputs' energy",
        "the mean's share of the energy of dW's response",
    )
    for axis, title, values in zip(axes, titles, (shares, responses), strict=True):
        for i, ((color, label), heights) in enumerate(zip(looks, values, strict=True)):
            places = [k + 0.27 * (i - 1) for k in range(len(targets))]
            axis.bar(places, heights, 0.25, color=color, label=label)
        axis.set_xticks(range(len(targets)), targets)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, ncols=3, loc="upper center", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    return figure


FIGURES = {  # how each is drawn, and of which results
    "bench-tokens.png": (by_tokens, "layer-xeon-167.json"),
    "bench-density.png": (by_density, "density-epyc-zen4.json"),
    "equal-forgetting.png": (of_spelling, "forgetting.jsonl"),
    "forgetting.png": (by_forgetting, "forgetting.jsonl"),
    "inputs.png": (by_inputs, "inputs-zen5.json", "forgetting.jsonl"),
}


def results(file: str):
    """A file of results: of JSON as it is, of finetune.py the rows."""
    path = ROOT / "results" / file
    return read(path) if file.endswith(".jsonl") else json.loads(path.read_text())


def digest(files: list[str]) -> str:
    """Of files of results, by which a test tells whether a figure was drawn from them."""
    contents = b"".join((ROOT / "results" / file).read_bytes() for file in files)
    return hashlib.sha256(contents).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT.parent / "docs" / "figures")
    args = parser.parse_args(arguments)

    args.out.mkdir(parents=True, exist_ok=True)
    for name, (draw, *files) in FIGURES.items():
        metadata = {"Results": digest(files)}
        draw(*map(results, files)).savefig(args.out / name, dpi=110, metadata=metadata)


if __name__ == "__main__":
    main()
