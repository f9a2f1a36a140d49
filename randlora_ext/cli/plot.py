"""The picture of an adapter: spectra of all layers, and their effective ranks as a heat map."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

_MANY = 12  # with so many layers a legend would hide the curves


def draw(file: Path, layers: dict[str, tuple[Tensor, float]]) -> None:
    """Writes a PNG of {path: (singular values, effective rank)}."""
    places = {path: _block_and_name(path) for path in layers}
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*places.values(), strict=True))
    figure = Figure(figsize=(13, max(4.0, 0.22 * len(rows) + 2)), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever MPLBACKEND says
    left, right = figure.subplots(1, 2)

    grid = np.full((len(rows), len(columns)), np.nan)  # NaN: there is no such layer
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for (path, (values, rank)), shade in zip(layers.items(), shades, strict=True):
        block, name = places[path]
        grid[rows.index(block), columns.index(name)] = rank / len(values)
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
    if left.lines and len(layers) < _MANY:
        left.legend(fontsize="small")
    image = right.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    right.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    right.set_yticks(range(len(rows)), rows, fontsize="small")
    right.set_title("Effective rank of dW / d")
    figure.colorbar(image, ax=right)
    figure.savefig(file, dpi=110, format="png")


def _block_and_name(path: str) -> tuple[str, str]:
    """("layers.3", "self_attn.q_proj"): split after the first number, if there is one."""
    parts = path.split(".")
    number = next((k for k, part in enumerate(parts[:-1]) if part.isdigit()), None)
    cut = len(parts) - 1 if number is None else number + 1
    return ".".join(parts[:cut]) or "model", ".".join(parts[cut:])
