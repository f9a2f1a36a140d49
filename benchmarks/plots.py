"""Draws the figures of README from results that the other programs wrote.

    python benchmarks/plots.py epyc-zen4           reads benchmarks/results/*-epyc-zen4.json

What each figure needs, and what writes it (CONTRIBUTING.md, "Measure"):

    bench-tokens.png       layer-NAME       layer.py over several numbers of tokens
    bench-density.png      density-NAME     layer.py over many densities, at one size
    bench-memory.png       methods-NAME     layer.py --methods all --memory
    bench-roofline.png     micro-NAME       micro.py
    bench-checkpoint.png   nothing: sizes are computed
"""

import argparse
import json
from pathlib import Path

import checkpoint
import matplotlib
from methods import density_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent
DENSITIES = {"1/3": "tab:blue", "0.07": "tab:orange", "very_sparse": "tab:green"}
METHODS = {
    "lora": "LoRA",
    "peft": "RandLoRA in PEFT",
    "dora": "DoRA",
    "vera": "VeRA",
    "full": "full fine-tuning",
    "ours": "RandLoRA here",
}
RATIO = "step over the frozen layer's"


def conditions(result: dict) -> str:
    m = result["machine"]
    return (
        f"{m['cpu']}, {m['threads']} threads, {m['isa']}, torch {m['torch']}, PEFT {m['peft']}, "
        f"commit {m['commit']}, {m['date'][:10]}"
    )


def finish(figure, text: str):
    """The conditions below, small, as no figure should be without them."""
    figure.tight_layout(rect=(0, 0.045, 1, 0.94 if figure.legends else 1))
    figure.text(0.5, 0.012, text, ha="center", fontsize=7, color="0.35")
    return figure


def by_tokens(result: dict):
    """A panel a size: LoRA, PEFT and ours against the number of tokens."""
    rows = result["rows"]
    sizes = sorted({(r["in"], r["out"]) for r in rows})
    figure, axes = plt.subplots(1, len(sizes), figsize=(9, 3.6), sharey=True, squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        mine = sorted((r for r in rows if (r["in"], r["out"]) == size), key=lambda r: r["tokens"])
        for name, style in (("peft", "k:"), ("lora", "k--")):
            line = [r for r in mine if r["density"] == "very_sparse"]
            axis.plot([r["tokens"] for r in line], [r[name] for r in line], style,
                      label=METHODS[name])  # fmt: skip
        for density, color in DENSITIES.items():
            line = [r for r in mine if r["density"] == density]
            axis.plot([r["tokens"] for r in line], [r["ours"] for r in line], "o-", color=color,
                      markersize=4, label=f"here, density {density}")  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        counts = sorted({r["tokens"] for r in mine})
        axis.set_xticks(counts, [str(count) for count in counts])
        ticks = [1, 1.5, 2, 3, 5, 8, 12]
        axis.set_yticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.set(title=f"{size[0]} x {size[1]}", xlabel="tokens")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(RATIO)
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, ncols=len(labels), loc="upper center", fontsize=8)
    return finish(figure, f"{rows[0]['dtype']}, r = 32, medians; {conditions(result)}")


def by_density(result: dict):
    """Ours and LoRA's line against the density, at one size."""
    rows = result["rows"]
    figure, axis = plt.subplots(figsize=(9, 3.8))
    for tokens, color in zip(sorted({r["tokens"] for r in rows}), DENSITIES.values(), strict=False):
        mine = [r for r in rows if r["tokens"] == tokens]
        line = sorted((density_of(r["density"], min(r["in"], r["out"])), r["ours"]) for r in mine)
        axis.plot(*zip(*line, strict=True), "o-", color=color, label=f"here, {tokens} tokens")
        lora = sorted(r["lora"] for r in mine)[len(mine) // 2]
        axis.axhline(lora, linestyle="--", color=color, alpha=0.7, label=f"LoRA, {tokens} tokens")
    axis.set_xscale("log")
    axis.set(
        xlabel="density of the bases", ylabel=RATIO, title=f"{rows[0]['in']} x {rows[0]['out']}"
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return finish(figure, f"{rows[0]['dtype']}, r = 32, medians; {conditions(result)}")


def memory(result: dict):
    """MiB at the peak of a step over the frozen layer's, a panel a row of the results."""
    rows = result["rows"]
    figure, axes = plt.subplots(1, len(rows), figsize=(9, 3.2), sharey=True, squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        values = [max(row[f"{name}_mib"], 0) for name in METHODS]
        colors = ["tab:green" if name == "ours" else "0.6" for name in METHODS]
        axis.bar_label(axis.barh(list(METHODS.values()), values, color=colors), fmt="%.0f",
                       padding=2, fontsize=8)  # fmt: skip
        axis.set(xlim=(0, 1.18 * max(values)), xlabel="MiB over the frozen layer's peak")
        axis.set_title(
            f"{row['in']} x {row['out']}, {row['tokens']} tokens, density {row['density']}\n"
            f"frozen: {row['frozen_mib']:.0f} MiB", fontsize=8
        )  # fmt: skip
        axis.invert_yaxis() if axis is axes[0][0] else None
    return finish(figure, f"{rows[0]['dtype']}, r = 32, peak of a step; {conditions(result)}")


def checkpoints(sizes: dict[str, int]):
    figure, axis = plt.subplots(figsize=(7, 2.2))
    megabytes = [count / 1e6 for count in sizes.values()]
    axis.bar_label(axis.barh(list(sizes), megabytes, color=["0.6", "0.6", "tab:green"]),
                   fmt="{:,.0f} MB", padding=3)  # fmt: skip
    axis.set(xscale="log", xlim=(10, 12000), xlabel="MB of the saved adapter, float32")
    axis.invert_yaxis()
    return finish(
        figure, "Llama-3.2-3B, q_proj and v_proj, r = 32; python benchmarks/checkpoint.py"
    )


def roofline(result: dict):
    """Share of the roofline by operator and density, at the largest size and number of tokens."""
    rows = [r for r in result["rows"] if r["dtype"] in ("", "fp32")]
    largest = max(r["in"] * r["out"] for r in rows)
    tokens = max(r["tokens"] or 0 for r in rows)
    mine = [r for r in rows if r["in"] * r["out"] == largest and r["tokens"] in (None, tokens)]
    names = list(dict.fromkeys(r["op"] for r in sorted(mine, key=lambda r: r["tokens"] is None)))
    figure, axis = plt.subplots(figsize=(8, 4.6))
    for shift, (density, color) in enumerate(DENSITIES.items()):
        found = [(names.index(r["op"]) + 0.27 * (shift - 1), r) for r in mine
                 if r["density"] == density]  # fmt: skip
        bars = axis.barh([y for y, _ in found], [100 * r["roofline"] for _, r in found], 0.25,
                         color=color, label=f"density {density}")  # fmt: skip
        axis.bar_label(bars, [r["bound"] for _, r in found], fontsize=6, padding=2, color="0.35")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(100, color="k", linewidth=0.8)
    axis.set(xlabel="percent of the roofline (which bound)", xlim=(0, None))
    axis.legend(fontsize=8)
    peak = result["peaks"]["operations"] / 1e9
    about = f"{mine[0]['in']} x {mine[0]['out']}, {tokens} tokens, fp32, r = 32"
    axis.set_title(f"{about}; peak {peak:.0f} G multiply-adds/s", fontsize=9)
    return finish(figure, conditions(result))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the machine in the names of the results")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--out", type=Path, default=ROOT.parent / "docs" / "figures")
    args = parser.parse_args(arguments)

    def read(kind: str) -> dict:
        return json.loads((args.results / f"{kind}-{args.name}.json").read_text())

    figures = {
        "tokens": by_tokens(read("layer")),
        "density": by_density(read("density")),
        "memory": memory(read("methods")),
        "roofline": roofline(read("micro")),
        "checkpoint": checkpoints(checkpoint.sizes()),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(args.out / f"bench-{name}.png", dpi=110)


if __name__ == "__main__":
    main()
