"""The readable tables of a result file: `python -m gpu.report results.json` prints them again."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from .stage import BALANCED


def table(head: list[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [head, ["---"] * len(head), *([text(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "/")


def megabytes(value: int | None) -> float | None:
    return None if value is None else value / 2**20


def rows_of(results: dict, stage: str, **match: object) -> list[dict]:
    rows = results["stages"].get(stage, {}).get("rows", [])
    return [r for r in rows if all(r.get(k) == v for k, v in match.items())]


def stages(results: dict) -> str:
    lines = []
    for name, stage in results["stages"].items():
        rows = stage.get("rows", [])
        note = "; ".join(
            f"{kind} {sum(kind in r for r in rows)}"
            for kind in ("failed", "skipped") if any(kind in r for r in rows)
        )  # fmt: skip
        lines.append([name, stage["status"], stage.get("seconds"), len(rows), note])
    return table(["stage", "status", "seconds", "rows", ""], lines)


def checks(results: dict) -> str:
    parts = []
    for row in rows_of(results, "checks"):
        counts = ", ".join(f"{number} {word}" for word, number in row["counts"].items())
        late = "; stopped: out of time" if row["stopped_by_time"] else ""
        parts.append(f"GPU tests: {counts}{late}")
        parts += [f"- broken: `{name}`" for name in row["broken"]]
    for row in rows_of(results, "sanitizer"):
        if "run" in row:
            verdict = "as wanted" if row["as_wanted"] else "NOT as wanted"
            verdict = "unfinished: out of time" if row["stopped_by_time"] else verdict
            parts.append(f"- {row['run']}: {verdict}; {row['calls']} calls; {row['summary']}")
    for row in rows_of(results, "layers", verified=False):
        parts.append(f"- WRONG: {row['method']} {row['density']} {row['size']}: {row['error']}")
    return "\n".join(parts) + "\n"


def figures(results: dict) -> str:
    """The figures that the project aims at on an H100, and what was measured."""
    if results["dry"]:
        return "A dry run has none.\n"
    lines = []
    for row in rows_of(results, "kernels", op="delta_weight", size="4096x4096"):
        if row["density"] == "1/sqrt(d)":
            lines.append(["dW 4096x4096, 1/sqrt(d), bf16", "25 us", f"{row['us']:.1f} us"])
    at = {"size": "4096x4096", "tokens": 8192}
    for density in dict.fromkeys(r.get("density") for r in rows_of(results, "layers", **at)):
        rows = [r for r in rows_of(results, "layers", density=density, **at) if "over_frozen" in r]
        exact = [r["over_frozen"] for r in rows if r["method"].startswith(("factored", "delta"))]
        merged = [r["over_frozen"] for r in rows if r["method"] == "merged"]
        what = f"layer 4096x4096, T=8192, {density}, over frozen"
        if density == BALANCED and exact:
            lines.append([what + ", exact", "1.35x", f"{min(exact):.2f}x"])
        elif density and exact and merged:
            lines.append([what + ", exact", "2.2x", f"{min(exact):.2f}x"])
            lines.append([what + ", merged", "1.6x", f"{min(merged):.2f}x"])
    for row in rows_of(results, "kernels", op="whole basis", size="14336x4096"):
        measured = f"{row['us'] / 1e3:.2f} ms"
        lines.append([f"basis 14336x4096, {row['density']}", "1 ms", measured])
    for row in rows_of(results, "model"):
        if row.get("method", "").startswith(("ours", "PEFT")) and "over_lora" in row:
            what = f"tokens/s over LoRA r=32 (the faster), {row['method']}"
            lines.append([what, "1.0x", f"{row['over_lora']:.2f}x"])
    return table(["figure", "aim", "measured"], lines) if lines else "Nothing measured.\n"


def layers(results: dict) -> str:
    timed = [r for r in rows_of(results, "layers") if "step_ms" in r]
    parts = []
    columns = [
        ("Forward and backward on the card, ms (over the frozen layer)", "step_ms", 1.0),
        ("Forward alone on the card, ms", "forward_ms", 1.0),
        ("Forward and backward as launched by Python, caches warm, ms", "eager_ms", 1.0),
        ("Kept for backward, MiB", "saved_bytes", 2**-20),
        ("Peak memory of a step, MiB", "peak_bytes", 2**-20),
    ]
    for size in dict.fromkeys(r["size"] for r in timed):
        mine = [r for r in timed if r["size"] == size]
        tokens = sorted({r["tokens"] for r in mine})
        methods = dict.fromkeys((r["method"], r["density"]) for r in mine)
        cells = {(r["method"], r["density"], r["tokens"]): r for r in mine}
        parts.append(f"### {size} (in x out)\n")
        for title, column, factor in columns:
            lines = []
            for method, density in methods:
                line = [method, density]
                for count in tokens:
                    row = cells.get((method, density, count), {})
                    value = row.get(column)
                    cell = text(None if value is None else value * factor)
                    if column == "step_ms" and "over_frozen" in row:
                        cell += f" ({row['over_frozen']:.2f}x)" + (
                            " *" if row.get("chosen") else ""
                        )
                        cell += " e" if row["timing"] == "eager" else ""
                    line.append(cell)
                lines.append(line)
            head = ["method", "density", *(f"T={count}" for count in tokens)]
            parts.append(f"{title}\n\n{table(head, lines)}")
    note = (
        "\\* what the cost model takes. e: not captured as a graph, launch gaps included. The L2 "
        "is flushed before every call on the card.\n"
    )
    return "\n".join([note, *parts]) if parts else "Nothing measured.\n"


def beside_floors(row: dict) -> list[object]:
    return [row.get("byte_us"), row.get("operation_us"), row.get("over_floor")]


def operators(results: dict) -> str:
    lines = []
    for r in rows_of(results, "kernels"):
        if "us" in r:
            us = text(r["us"]) + (" e" if r["timing"] == "events" else "")
            lines.append([r["op"], r["size"], r["density"], r["tokens"], us, *beside_floors(r)])
    head = ["operator", "size", "density", "T", "us", "byte floor", "operation floor", "over floor"]
    note = "e: no graph (what waits for the card cannot be one), launch gaps included.\n\n"
    return note + table(head, lines) if lines else "Nothing measured.\n"


def kernels(results: dict) -> str:
    """Every kernel of every operator, also those that have no floor."""
    lines = []
    for r in rows_of(results, "kernels"):
        for k in r.get("kernels", []):
            floors = beside_floors(k)
            if "floor" in k:
                floors[-1] = k["floor"]
            lines.append([r["op"], r["size"], r["density"], r["tokens"], f"`{k['kernel']}`",
                          k["launches"], k["us"], *floors])  # fmt: skip
    head = ["operator", "size", "density", "T", "kernel", "launches", "us", "byte floor",
            "operation floor", "over floor"]  # fmt: skip
    note = (
        "Of one call, all launches together, caches warm: what lies in the L2 can take less than "
        "its byte floor. A kernel's floor counts what it moves itself, intermediates included.\n\n"
    )
    return note + table(head, lines) if lines else "Nothing measured.\n"


def model(results: dict) -> str:
    rows = [r for r in rows_of(results, "model") if "tokens_per_s" in r]
    head = ["method", "tokens/s", "over LoRA", "step, ms", "peak memory, MiB", "adapter, MiB"]
    lines = (
        [r["method"], r["tokens_per_s"], r.get("over_lora"), r["step_ms"],
         megabytes(r["peak_bytes"]), megabytes(r["adapter_bytes"])]
        for r in rows
    )  # fmt: skip
    return table(head, lines) if rows else "Nothing measured.\n"


def trouble(results: dict) -> str:
    lines = []
    for name, stage in results["stages"].items():
        for row in stage.get("rows", []):
            for kind in ("failed", "skipped"):
                if kind in row:
                    lines.append(f"- {name}: {kind}: {row[kind]}: {row['why']}")
    return "\n".join(lines or ["None."]) + "\n"


def markdown(results: dict) -> str:
    ceilings = next(iter(rows_of(results, "ceilings")), {})
    rates = ", ".join(
        f"{label} {ceilings[key] / unit:.3g} {name}"
        for label, key, unit, name in (
            ("copy", "copy_bytes_per_s", 1e12, "TB/s"),
            ("bf16 GEMM", "bf16_flop_per_s", 1e12, "TFLOP/s"),
            ("fp32 GEMM", "fp32_flop_per_s", 1e12, "TFLOP/s"),
        )
        if key in ceilings
    )
    about = f"{results['date']}, commit {results['commit']}, torch {ceilings.get('torch', '?')}"
    dry = " (dry run: tiny shapes on the CPU, no figures)" if results["dry"] else ""
    return f"""# {results["card"]}{dry}

{about}. Measured ceilings: {rates or "none"}.
Made by `benchmarks/gpu_run.py`; the numbers are in the JSON file beside this one.

{stages(results)}
## Checks

{checks(results)}
## Figures aimed at (H100)

{figures(results)}
## Layers, bf16

{layers(results)}
## Operators

{operators(results)}
## Kernels

{kernels(results)}
## Llama-3.2-3B-shaped model, q and v adapted, bf16

{model(results)}
## What failed or was left out

{trouble(results)}"""


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
