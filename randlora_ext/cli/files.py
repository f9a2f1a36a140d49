"""Errors that a user has to fix, and files that are read or written as a whole."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CliError(Exception):
    """A message of one line: what was wrong, and what would be right."""


def first_line(error: BaseException) -> str:
    """The part of another library's error that fits into a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_json(path: Path, needed: str = "") -> dict:
    """The JSON object in a file; `needed` says in the error why it must exist."""
    if not path.is_file():
        raise CliError(f"{path} does not exist{needed}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CliError(f"{path} is no JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise CliError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def check_free(out: Path) -> None:
    """Refuses what `complete` would refuse: to be called before long work."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CliError(f"{out} exists; choose another name or remove it first")
    if not out.absolute().parent.is_dir():
        raise CliError(f"{out.absolute().parent} does not exist")


@contextmanager
def complete(out: Path) -> Iterator[Path]:
    """A path to write to, which becomes `out` at the end; after an exception there is nothing.

    CliError names `out` and the cause if the disk is full or something else forbids writing.
    """
    from safetensors import SafetensorError

    check_free(out)
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
        yield scratch / out.name
        check_free(out)
        os.rename(scratch / out.name, out)
    except (OSError, SafetensorError) as error:
        raise CliError(f"{out} cannot be written: {first_line(error)}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
