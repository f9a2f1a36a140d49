"""What the demo shows at the end: a summary with a table of answers, a plot and ``results.json``.

All three are made from one dictionary of measurements.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .data import Example

_SHOWN = 8  # answers in the table
_COLUMN = 30  # characters at most


def summary(results: Mapping[str, Any], out: Path) -> str:
    """The table and one line for each measurement."""
    parameters, reload = results["parameters"], results["reload"]
    share = parameters["trained"] / parameters["total"]
    losses, exact, errors = (
        results[key] for key in ("held_out_loss", "exact_answers", "symbol_error_rate")
    )
    step = statistics.median(results["step_seconds"])
    tokens = statistics.mean(results["step_tokens"])
    lines = {
        "held-out loss": f"{losses[0]:.3f} -> {losses[1]:.3f} per answer token",
        "exact answers": f"{exact[0]} -> {exact[1]} of {results['examples']['answered']}",
        "symbols wrong": f"{errors[0]:.1%} -> {errors[1]:.1%} (edits, per symbol of the truth)",
        "trained": f"{parameters['trained']:,} of {parameters['total']:,} parameters ({share:.2%})",
        "adapter file": f"{format_bytes(results['adapter_bytes'])} in {out / 'adapter'}",
        "reloaded": f"{'same logits' if reload['same'] else 'OTHER LOGITS'}: largest difference "
        f"{reload['max_difference']:.3g} ({reload['max_difference_without_adapter']:.3g} "
        "without the adapter)",
        "training speed": f"{step:.2f} s a step (median), {tokens / step:,.0f} tokens/s",
        "kernels": ("\n" + " " * 16).join(results["kernels"]),
        "loss plot": str(out / "loss.png"),
        "total time": f"{results['total_seconds']:.0f} s",
    }
    table = answer_table(results["answers"][:_SHOWN])
    return "\n".join(["", *table, "", *(f"{k:<15} {v}" for k, v in lines.items())])


def answer_rows(
    examples: Sequence[Example], before: Sequence[str], after: Sequence[str]
) -> list[dict[str, str]]:
    """One dictionary an example: word, truth, before, after."""
    return [
        {"word": example.name, "truth": example.answer, "before": old, "after": new}
        for example, old, new in zip(examples, before, after, strict=True)
    ]


def answer_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines of a table with a column for each key; long cells are cut."""
    keys = list(rows[0])
    cells = [keys, *([_shorten(row[key]) for key in keys] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(keys))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return [line.rstrip() for line in lines]


def plot_loss(path: Path, results: Mapping[str, Any]) -> None:
    """Training loss of each step, and the held-out loss before and after, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses, held_out = results["train_loss"], results["held_out_loss"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever MPLBACKEND says
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=1.5, label="training batch")
    axes.plot([0, len(losses)], held_out, "o", color="black", label="held-out examples")
    for x, y in zip((0, len(losses)), held_out, strict=True):
        axes.annotate(f"{y:.2f}", (x, y), textcoords="offset points", xytext=(6, 6))
    options = results["options"]
    title = f"RandLoRA, rank {options['rank']}, density {options['density']:.3g}"
    axes.set(
        xlabel="step",
        ylabel="loss per answer token",
        title=title,
        ylim=(0, 1.1 * max([*losses, *held_out])),
    )
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Everything measured, as JSON."""
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with their paths as text."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What somebody else needs to know to compare the timings."""
    return {
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def format_bytes(size: int) -> str:
    """``1234567`` -> ``1.23 MB`` (decimal units)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"


def _shorten(text: str) -> str:
    return text if len(text) <= _COLUMN else text[: _COLUMN - 3] + "..."
