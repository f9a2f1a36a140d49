"""``--inspect ADAPTER``: what is in an adapter, and what its weight changes look like."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .adapter import Adapter, read_adapter
from .checkpoint import find_base, read_checkpoint
from .errors import CliError
from .outputs import check_new, new_file
from .skeleton import adapted_layers, shapes_of, skeleton

_FIELDS = ("r", "randlora_alpha", "basis", "density", "sparse", "very_sparse",
           "randlora_dropout", "projection_prng_key", "save_projection",
           "base_model_name_or_path")  # fmt: skip


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one dW, descending, and what they come to."""

    values: Tensor  # (d,)

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.values.norm())

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of p = values / sum(values): d where all are equal, 1 where one is.

        0 for dW = 0. Source: Roy and Vetterli, The effective rank (EUSIPCO 2007).
        """
        total = self.values.sum()
        if total == 0:
            return 0.0
        return float(torch.special.entr(self.values / total).sum().exp())

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over the largest squared singular value; 0 for dW = 0."""
        largest = self.values[0]
        return float(self.values.square().sum() / largest.square()) if largest > 0 else 0.0


def inspect(
    folder: Path, base: str | None = None, layers: str | None = None, plot: Path | None = None
) -> int:
    """Prints configuration, sizes, and a line for every layer.

    Args:
        base: the base model, a folder or a name in the hub's cache. B is as tall as max(in, out),
            which an adapter's own tensors do not tell, so without the base there is no dW.
        layers: regular expression; only layers in whose path it is found.
        plot: a PNG to write: the spectra, and the effective rank of each layer as a heat map.
    """
    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise CliError(f"--plot must end in .png, got {plot}")
        check_new(plot)
    adapter = read_adapter(folder)
    chosen = _chosen(adapter, layers)
    if base is None and adapter.config.base_model_name_or_path is None and plot is None:
        spectra, without = None, "no base model is named"
    else:
        try:
            spectra, without = _spectra(adapter, base, chosen), ""
        except CliError as error:
            if base is not None or plot is not None:
                raise
            spectra, without = None, str(error)
    if plot is not None:  # first, so that an error leaves no half of a report
        assert spectra is not None
        _write_plot(plot, spectra)
    print("\n".join(_head(adapter)))
    print("\n".join(_table(adapter, chosen, spectra)))
    if spectra is None:
        print(f"dW is not told: {without}; give the base model's folder by --base")
    else:
        print(
            "|dW| is the Frobenius norm; effective rank exp(entropy of the normalised singular "
            "values), stable rank |dW|^2 / (largest singular value)^2"
        )
    if plot is not None:
        print(f"plot: {plot}")
    return 0


def _chosen(adapter: Adapter, layers: str | None) -> list[str]:
    try:
        pattern = re.compile(layers or "")
    except re.error as error:
        raise CliError(f"--layers {layers!r} is no regular expression: {error}") from error
    chosen = [path for path in adapter.layers if pattern.search(path)]
    if not chosen:
        raise CliError(f"--layers {layers!r} is found in none of {len(adapter.layers)} layers")
    return sorted(chosen, key=_natural)


def _natural(path: str) -> list:
    """layers.2 before layers.10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.split(".")]


@torch.no_grad()
def _spectra(adapter: Adapter, base: str | None, chosen: list[str]) -> dict[str, Spectrum]:
    found = find_base(base or adapter.config.base_model_name_or_path)
    model = skeleton(adapter, shapes_of(adapter, read_checkpoint(found)))
    layers = adapted_layers(model)
    spectra = {}
    for path in tqdm(chosen, desc="singular values", unit="layer", leave=False):
        delta = layers[path].get_delta_weight("default")
        if not bool(torch.isfinite(delta).all()):
            raise CliError(f"{path}: dW holds NaN or inf")
        spectra[path] = Spectrum(torch.linalg.svdvals(delta))
    return spectra


def _head(adapter: Adapter) -> list[str]:
    trained = sum(lam.numel() + gam.numel() for lam, gam in adapter.layers.values())
    fields = {name: getattr(adapter.config, name, None) for name in _FIELDS}
    bases = sum(t.numel() * t.element_size() for t in adapter.bases.values())
    held = f"saved, {bases:,} bytes in one copy" if adapter.bases else "not saved"
    others = f"; and {len(adapter.others)} other tensors" if adapter.others else ""
    return [
        f"adapter: {adapter.source}",
        "config: " + ", ".join(f"{k}={v}" for k, v in fields.items() if v not in (None, False)),
        f"{adapter.file.name}: {adapter.file_bytes:,} bytes; bases: {held}",
        f"{len(adapter.layers)} layers, {trained:,} trained numbers in lambda and gamma{others}",
    ]


def _table(adapter: Adapter, chosen: list[str], spectra: dict[str, Spectrum] | None) -> list[str]:
    head = ["layer", "r x n", "n x d", "|lambda|", "|gamma|"]
    rows = [head if spectra is None else [*head, "|dW|", "effective rank", "stable rank"]]
    for path in chosen:
        lam, gam = adapter.layers[path]
        shapes = ["{} x {}".format(*lam.shape), "{} x {}".format(*gam.shape)]
        row = [path, *shapes, f"{lam.float().norm():.4g}", f"{gam.float().norm():.4g}"]
        if spectra is not None:
            s = spectra[path]
            row += [f"{s.norm:.4g}", f"{s.effective_rank:.1f}", f"{s.stable_rank:.1f}"]
        rows.append(row)
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _write_plot(plot: Path, spectra: dict[str, Spectrum]) -> None:
    try:
        from .spectrum_plot import draw
    except ImportError as error:
        raise CliError(f"--plot needs matplotlib: {error}; pip install matplotlib") from error
    with new_file(plot) as scratch:
        draw(scratch, {path: (s.values, s.effective_rank) for path, s in spectra.items()})
