"""What the demo shows at its end; after Ctrl-C, what had been measured by then."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(results: Mapping[str, Any], out: Path) -> None:
    """Write ``results.json``, and ``loss.png`` if there was a training step."""
    text = json.dumps(results, indent=2) + "\n"
    (out / "results.json").write_text(text, encoding="utf-8")
    if "train_loss" in results:
        _plot_loss(results, out / "loss.png")


def summary(results: Mapping[str, Any], out: Path) -> str:
    """The table of answers, a line for each measurement, and the commands to try next."""
    stages = [name for name in ("before", "after") if name in results]

    def over_time(form: str, key: str) -> str:
        return " -> ".join(form.format(results[stage][key]) for stage in stages) or "not measured"

    count = results["parameters"]
    lines = {
        "trained": f"{count['trained']:,} of {count['total']:,} parameters",
        "held-out loss": over_time("{:.3f}", "held_out_loss") + " per answer token",
        "exact answers": over_time("{}", "exact_answers") + f" of {len(results['prompts'])}",
        "wrong symbols": over_time("{:.0%}", "symbol_error_rate"),
    }
    if "train_loss" in results:
        steps, seconds = len(results["train_loss"]), results["seconds_per_step"]
        lines["training"] = f"{steps} steps, {seconds:.2f} s each"
        lines["kernels"] = results["kernels"]
        lines["adapter"] = f"{results['adapter_bytes'] / 1e6:.2g} MB in {out / 'adapter'}"
        lines["loss plot"] = str(out / "loss.png")
    if "effective_rank" in results:
        ranks = results["effective_rank"].items()
        lines["effective rank"] = ", ".join(f"{name} {r:.0f} of {d:.0f}" for name, (r, d) in ranks)
        lines["effective rank"] += " (of dW, mean over layers)"
    if "reload_difference" in results:
        lines["reloaded"] = f"largest difference of a logit: {results['reload_difference']:.1g}"
    lines["total time"] = f"{results['total_seconds']:.0f} s"
    columns = [results["prompts"], results["right_answers"]]
    columns += [results[stage]["answers"] for stage in stages]
    rows = [("prompt", "right answer", *stages), *zip(*columns, strict=True)]
    text = ["", *("".join(f"{cell[:26]:<28}" for cell in row).rstrip() for row in rows[:9])]
    text += ["", *(f"{name:<16}{value}" for name, value in lines.items())]
    if "train_loss" in results:
        text += _next_commands(results["options"], out)
    return "\n".join(text)


def _next_commands(options: Mapping[str, Any], out: Path) -> list[str]:
    """What can be done with the adapter; each command works as printed, in this order."""
    adapter = out / "adapter"
    commands = []
    base = options["source"]
    if not Path(base).is_dir():
        base, named = out / "base", ["--model", options["model"]] if options["model"] else []
        commands.append(["python", "-m", "randlora_ext.demo", "--save-base", *named, "--out", out])
    to_lora = ["--to", "lora", "--energy", "0.9", "--base", base]
    commands.append(["randlora", "convert", adapter, out / "adapter-as-lora", *to_lora])
    commands.append(["randlora", "merge", base, adapter, out / "merged"])
    return ["", "Next:", *("  " + shlex.join(map(str, words)) for words in commands)]


def _plot_loss(results: Mapping[str, Any], path: Path) -> None:
    """Training loss of each step, and held-out loss before and after."""
    from matplotlib.figure import Figure

    losses, options = results["train_loss"], results["options"]
    held_out = [results[s]["held_out_loss"] for s in ("before", "after") if s in results]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, label="training batch")
    axes.plot([0, len(losses)][: len(held_out)], held_out, "ko", label="held-out examples")
    axes.set(xlabel="step", ylabel="loss per answer token", ylim=(0, None))
    axes.set_title(f"RandLoRA, r = {options['rank']}, {options['basis']} bases")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
