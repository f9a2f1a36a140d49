"""What the commands of `randlora_cli` do: a module of that name, with a function of that name.

`merge` reads an adapter without its model (adapter.py), and a model folder by the headers of its
files and one tensor at a time (checkpoint.py).
"""

import sys
import traceback
from contextlib import contextmanager
from importlib import import_module
from typing import Any


class CliError(Exception):
    """A message of one line: what was wrong, and what would be right."""


def run(command: str, **options: Any) -> int:
    """Runs one command; returns the exit code (docs/cli.md). After an error nothing is written."""
    place = "..diagnostics" if command == "check" else f".{command}"
    try:
        return getattr(import_module(place, __package__), command)(**options)
    except ImportError as error:
        told = f'{one_line(error)}; pip install "randlora-ext[peft]" brings what is needed'
    except (CliError, OSError) as error:
        told = one_line(error)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:  # our bug: a report needs the traceback
        traceback.print_exc()
        told = f"unexpected {type(error).__name__}; please report it"
    print(f"error: {told}", file=sys.stderr)
    return 2


def one_line(error: BaseException) -> str:
    told = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return " ".join(told.split()) or type(error).__name__


@contextmanager
def told_of(what: object, errors: Any):
    """Raises the block's error as a CliError that names `what`."""
    try:
        yield
    except errors as error:
        told = one_line(error)
        raise CliError(told if str(what) in told else f"{what}: {told}") from error
