"""``randlora inspect``: what is in an adapter, and what its weight changes look like."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..writing import appear_new
from .adapter import Adapter, read_adapter
from .files import CliError, check_free
from .layers import layer_changes, shapes_of

_FIELDS = ("r", "randlora_alpha", "basis", "density", "sparse", "very_sparse", "randlora_dropout",
           "projection_prng_key", "save_projection", "base_model_name_or_path")  # fmt: skip


class Spectrum(NamedTuple):
    """Singular values of one dW, descending, and figures made from them; ranks of dW = 0 are 0.

    Attributes:
        norm: Frobenius norm.
        effective_rank: exp of the entropy of p = values / sum(values): d if all are equal, 1 if
            only one is not 0. Source: Roy and Vetterli, The effective rank (EUSIPCO 2007).
        stable_rank: squared Frobenius norm over the largest squared singular value.
    """

    values: Tensor
    norm: float
    effective_rank: float
    stable_rank: float

    @classmethod
    def of(cls, values: Tensor) -> "Spectrum":
        if values[0] == 0:
            return cls(values, 0.0, 0.0, 0.0)
        entropy = torch.special.entr(values / values.sum()).sum()
        stable = values.square().sum() / values[0].square()
        return cls(values, float(values.norm()), float(entropy.exp()), float(stable))


def inspect(
    source: Path, base: str | None = None, layers: str | None = None, plot: Path | None = None
) -> int:
    """Prints configuration, sizes, and a line for every layer.

    Args:
        base: the base model, a folder or a name in the hub's cache. B has max(in, out) rows,
            which PEFT's files do not tell, so without the base they give no dW.
        layers: regular expression; only layers whose paths contain a match.
        plot: a PNG to write: the spectra, and the effective rank of each layer as a heat map.
    """
    draw: Any = None if plot is None else _drawing(plot)
    adapter = read_adapter(source)
    chosen = _chosen(adapter, layers)
    spectra: dict[str, Spectrum] | None = None
    try:
        spectra = _spectra(adapter, base, chosen)
    except CliError as error:
        if base is not None or plot is not None:
            raise
        without = str(error)
    if plot is not None and spectra:  # first, so that an error leaves no half report
        with appear_new(plot) as scratch:
            draw(scratch, {path: (s.values, s.effective_rank) for path, s in spectra.items()})
    print("\n".join([*_head(adapter), *_table(adapter, chosen, spectra)]))
    if spectra is None:
        print(f"dW is not told: {without}")
    else:
        print(
            "|dW| is the Frobenius norm; effective rank exp(entropy of the normalised singular "
            "values), stable rank |dW|^2 / (largest singular value)^2"
        )
    if plot is not None:
        print(f"plot: {plot}")
    return 0


def _drawing(plot: Path) -> Any:
    """The function that draws; CliError, before anything is computed, if it cannot."""
    if plot.suffix.lower() != ".png":
        raise CliError(f"--plot must end in .png, got {plot}")
    check_free(plot)
    try:
        from .plot import draw
    except ImportError as error:
        raise CliError(f"--plot needs matplotlib: {error}; pip install matplotlib") from error
    return draw


def _chosen(adapter: Adapter, layers: str | None) -> list[str]:
    try:
        pattern = re.compile(layers or "")
    except re.error as error:
        raise CliError(f"--layers {layers!r} is no regular expression: {error}") from error
    chosen = [path for path in adapter.diagonals if pattern.search(path)]
    if not chosen:
        raise CliError(f"--layers {layers!r} is found in none of {len(adapter.diagonals)} layers")

    def natural(path: str) -> list:
        """layers.2 before layers.10."""
        return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.split(".")]

    return sorted(chosen, key=natural)


def _spectra(adapter: Adapter, base: str | None, chosen: list[str]) -> dict[str, Spectrum]:
    changes = layer_changes(adapter, shapes_of(adapter, base))
    spectra = {}
    for path in tqdm(chosen, desc="singular values", unit="layer", leave=False):
        delta = changes[path].delta()
        if not bool(torch.isfinite(delta).all()):
            raise CliError(f"{path}: dW holds NaN or inf")
        spectra[path] = Spectrum.of(torch.linalg.svdvals(delta))
    return spectra


def _head(adapter: Adapter) -> list[str]:
    fields = {name: getattr(adapter.config, name, None) for name in _FIELDS}
    if adapter.plain:
        layers = adapter.plain.values()
        options = [
            {"r": s.basis.r, "scaling": s.scaling, "basis": s.description.key()} for s in layers
        ]
        fields = {
            name: " or ".join(dict.fromkeys(str(o[name]) for o in options)) for name in options[0]
        }
    trained = sum(lam.numel() + gam.numel() for lam, gam in adapter.diagonals.values())
    size = sum(t.numel() * t.element_size() for t in adapter.bases.values())
    held = f"saved, {size:,} bytes in one copy" if size else "not saved"
    others = f"; and {len(adapter.others)} other tensors" if adapter.others else ""
    return [
        f"adapter: {adapter.source}",
        "config: " + ", ".join(f"{k}={v}" for k, v in fields.items() if v not in (None, False)),
        f"{adapter.file.name}: {adapter.file_bytes:,} bytes; bases: {held}",
        f"{len(adapter.diagonals)} layers, {trained:,} trained numbers in lambda and gamma{others}",
    ]


def _table(adapter: Adapter, chosen: list[str], spectra: dict[str, Spectrum] | None) -> list[str]:
    rows = [["layer", "r x n", "n x d", "|lambda|", "|gamma|"]]
    rows[0] += ["|dW|", "effective rank", "stable rank"] if spectra else []
    for path in chosen:
        lam, gam = adapter.diagonals[path]
        row = [path, "{} x {}".format(*lam.shape), "{} x {}".format(*gam.shape)]
        row += [f"{t.float().norm():.4g}" for t in (lam, gam)]
        if spectra:
            _, norm, effective, stable = spectra[path]
            row += [f"{norm:.4g}", f"{effective:.1f}", f"{stable:.1f}"]
        rows.append(row)
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]
