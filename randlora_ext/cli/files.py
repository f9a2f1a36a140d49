"""Errors that a user has to fix, and what is refused before long work."""

import json
from pathlib import Path

from ..writing import is_taken


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
    """Refuses what `appear_new` would refuse: to be called before long work."""
    if is_taken(out):
        raise CliError(f"{out} exists; choose another name or remove it first")
    if not out.absolute().parent.is_dir():
        raise CliError(f"{out.absolute().parent} does not exist")
