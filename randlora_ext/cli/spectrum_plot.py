"""The picture of an adapter: spectra of all layers, and their effective ranks as a heat map."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

_MANY = 12  # from so many layers on a legend would hide the curves


def draw(file: Path, layers: dict[str, tuple[Tensor, float]]) -> None:
    """Writes a PNG of {path: (singular values, effective rank)}."""
    grid, rows, columns = _grid(layers)
    height = max(4.0, 0.22 * len(rows) + 2)
    figure = Figure(figsize=(13, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever MPLBACKEND says
    left, right = figure.subplots(1, 2)

    shades = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for (path, (values, _)), shade in zip(layers.items(), shades, strict=True):
        if values[0] > 0:
            share = np.arange(1, len(values) + 1) / len(values)
            left.plot(share, (values / values[0]).numpy(), color=shade, lw=1, label=path)
    left.set(
        title="Spectra of dW, one line a layer, first (dark) to last",
        xlabel="index / d",
        ylabel="singular value / largest",
        yscale="log",
        ylim=(1e-4, 1.3),
    )
    left.grid(alpha=0.3)
    if left.lines and len(layers) <= _MANY:
        left.legend(fontsize="small")

    image = right.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    right.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    right.set_yticks(range(len(rows)), rows, fontsize="small")
    right.set_title("Effective rank of dW / d")
    figure.colorbar(image, ax=right)
    figure.savefig(file, dpi=110, format="png")


def _grid(layers: dict[str, tuple[Tensor, float]]) -> tuple[np.ndarray, list[str], list[str]]:
    """Rows are blocks, columns the names of layers in them; NaN where there is no such layer."""
    split = {path: _block_and_name(path) for path in layers}
    rows = list(dict.fromkeys(block for block, _ in split.values()))
    columns = list(dict.fromkeys(name for _, name in split.values()))
    grid = np.full((len(rows), len(columns)), np.nan)
    for path, (values, rank) in layers.items():
        block, name = split[path]
        grid[rows.index(block), columns.index(name)] = rank / len(values)
    return grid, rows, columns


def _block_and_name(path: str) -> tuple[str, str]:
    """("layers.3", "self_attn.q_proj"): split behind the first number, if there is one."""
    parts = path.split(".")
    number = next((k for k, part in enumerate(parts[:-1]) if part.isdigit()), None)
    cut = len(parts) - 1 if number is None else number + 1
    return ".".join(parts[:cut]) or "model", ".".join(parts[cut:])
