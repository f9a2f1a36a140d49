"""Saved adapters: tensors that record their configuration, and what belongs together."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..writing import SCRATCH
from .adapter_basis import other_bases

_METADATA = "randlora_ext"  # the entry of a safetensors header
_RECORDED = (
    "projection_prng_key", "basis", "density", "sparse", "very_sparse", "save_projection", "r",
    "randlora_alpha",
)  # fmt: skip


def name_of(folder: str | os.PathLike) -> str:
    """The name of a folder, or of the one that a scratch folder's files will be moved to."""
    place = Path(folder).absolute()
    return (place.parent if place.name.startswith(SCRATCH) else place).name


def copy_card(folder: str | os.PathLike, scratch: Path) -> None:
    """Copies the model card, because PEFT updates an existing card and keeps its text."""
    if (card := Path(folder, "README.md")).exists():
        shutil.copy(card, scratch)


def record_configurations(folder: Path) -> None:
    """Writes into every safetensors file which configuration it belongs to.

    A process may be killed between renaming the tensors and renaming the configuration. Two
    adapters of the same shapes cannot be told apart otherwise.
    """
    for config in folder.rglob(CONFIG_NAME):
        tensors = config.with_name(SAFETENSORS_WEIGHTS_NAME)
        if tensors.exists():
            fields = json.loads(config.read_text())
            text = json.dumps({name: fields[name] for name in _RECORDED if name in fields})
            new = tensors.with_suffix(".recorded")
            save_file(load_file(tensors), new, metadata={"format": "pt", _METADATA: text})
            os.replace(new, tensors)


def recorded_configuration(folder: str | os.PathLike) -> dict | None:
    """What `record_configurations` wrote; None for other files, and for those of the hub."""
    try:
        with safe_open(Path(folder, SAFETENSORS_WEIGHTS_NAME), "pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
    except (OSError, SafetensorError):  # reported by whoever reads the tensors
        return None
    return None if text is None else json.loads(text)


def refuse_torn_save(folder: str | os.PathLike) -> None:
    """Raises ValueError if tensors and configuration in `folder` are not from one save."""
    config, recorded = Path(folder, CONFIG_NAME), recorded_configuration(folder)
    if recorded is None or not config.exists():
        return
    if differences := misfits(json.loads(config.read_text()), recorded):
        raise ValueError(
            f"{config} does not belong to the {SAFETENSORS_WEIGHTS_NAME} beside it, whose "
            + ", ".join(differences)
            + ": a save was interrupted, or the file was edited. Save the adapter again; to load "
            "it with other fields, pass config= instead of editing the file"
        )


def misfits(own: Mapping, saved: Mapping) -> list[str]:
    """How the adapter of the fields `saved` differs from that of `own`, in words."""
    found = [
        f"{name} is {saved[name]!r}, not {own[name]!r}"
        for name in ("r", "randlora_alpha")
        if saved[name] != own[name]
    ]
    return found + ([] if saved.get("save_projection", True) else other_bases(own, saved))
