"""Draws the figures of README.md and docs/benchmarks.md from the results of layer.py.

    python benchmarks/plots.py epyc-zen4     from benchmarks/results/{layer,density}-epyc-zen4.json

    bench-tokens.png     layer-NAME.json      layer.py with several numbers of tokens
    bench-density.png    density-NAME.json    layer.py with many densities, at one size
    forgetting.png       forgetting-NAME.jsonl   finetune.py, a task a panel, a curve a method

Only float32 rows are drawn, so that no line mixes types.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from methods import density_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import (  # noqa: E402
    FixedLocator,
    LogLocator,
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


METHODS = {
    "hadamard scaled": ("tab:red", "o-", "Hadamard, calibrated"),
    "hadamard": ("tab:orange", "o-", "Hadamard"),
    "shira": ("tab:green", "s-", "SHiRA"),
    "shira scaled": ("tab:green", "s:", "SHiRA, inputs scaled"),
    "lora": ("k", "^-", "LoRA"),
    "lora scaled": ("k", "^:", "LoRA, inputs scaled"),
    "very_sparse": ("tab:purple", "v-", "very_sparse"),
    "c3a": ("tab:brown", "D-", "C3A"),
}


def by_forgetting(rows: list[dict]):
    """Forgetting over what was learned, if anything: a point a rate, the mean over its seeds."""
    usual = {"steps": 40, "r": 32, "targets": "four", "model": "fp32"}
    rows = [r for r in rows if usual.items() <= r.items() and r["held_out_loss"] < 2]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(10, 4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for method, (color, style, label) in METHODS.items():
            mine = [r for r in rows if r["task"] == task and r["method"] == method]
            points = []
            for rate in sorted({r["lr"] for r in mine}):
                each = [
                    (r["held_out_loss"], r["forgetting"]["manual"]) for r in mine if r["lr"] == rate
                ]
                points.append(tuple(sum(v) / len(each) for v in zip(*each, strict=True)))
            if points:
                axis.plot(*zip(*points, strict=True), style, color=color, markersize=4, label=label)
        axis.set(yscale="log", title=task, xlabel="held-out loss of the task")
        axis.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 4]))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("rise of the loss on Python's manual")
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, ncols=4, loc="upper center", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.87))
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="the machine's name in the names of the results")
    parser.add_argument("--out", type=Path, default=ROOT.parent / "docs" / "figures")
    args = parser.parse_args(arguments)

    args.out.mkdir(parents=True, exist_ok=True)
    for name, kind, draw in (("tokens", "layer", by_tokens), ("density", "density", by_density)):
        path = ROOT / "results" / f"{kind}-{args.name}.json"
        if not path.exists():
            print(f"no {path.name}: bench-{name}.png stays as it is")
            continue
        draw(json.loads(path.read_text())).savefig(args.out / f"bench-{name}.png", dpi=110)
    path = ROOT / "results" / f"forgetting-{args.name}.jsonl"
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        by_forgetting(rows).savefig(args.out / "forgetting.png", dpi=110)


if __name__ == "__main__":
    main()
