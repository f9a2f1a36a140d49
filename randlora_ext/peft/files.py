"""Saved adapters: files that appear when complete, and tensors that record their configuration."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .adapter_basis import other_bases

_SCRATCH = ".writing-"
_METADATA = "randlora_ext"  # the entry of a safetensors header
_RECORDED = (
    "projection_prng_key", "basis", "density", "sparse", "very_sparse", "save_projection", "r",
    "randlora_alpha",
)  # fmt: skip


@contextmanager
def appear_together(folder: str | os.PathLike) -> Iterator[Path]:
    """A scratch folder inside `folder`; its files are renamed into it when the block ends.

    Configurations come last, since loading starts with them. If the block raises, nothing in
    `folder` has changed. Scratch folders of processes that were killed are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
        yield Path(scratch)
        files = [path for path in Path(scratch).rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.suffix == ".json", path)):
            place = folder / path.relative_to(scratch)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)


def copy_card(folder: str | os.PathLike, scratch: Path) -> None:
    """Copies the model card, because PEFT updates an existing card and keeps its text."""
    if (card := Path(folder, "README.md")).exists():
        shutil.copy(card, scratch)


def name_of(folder: str | os.PathLike) -> str:
    """The name of a folder, or of the one that a scratch folder's files will be moved to."""
    place = Path(folder).absolute()
    return (place.parent if place.name.startswith(_SCRATCH) else place).name


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from removing the scratch folder as a left-over.

    The kernel releases a process's lock when it dies, so scratch folders in a folder without a
    lock are left-overs.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # another process is writing, or the file system has no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left_over in folder.glob(f"{_SCRATCH}*"):
                shutil.rmtree(left_over, ignore_errors=True)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield
    finally:
        os.close(lock)


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
