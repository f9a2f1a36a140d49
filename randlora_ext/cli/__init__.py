"""What the commands of `randlora_cli` do: a module of that name, with a function of that name.

`merge` reads an adapter without its model (adapter.py), and a model folder by the headers of its
files and one tensor at a time (checkpoint.py).
"""

import sys
import traceback
from collections.abc import Iterator
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
        message = f'{one_line(error)}; pip install "randlora-ext[peft]" brings what is needed'
    except (CliError, OSError) as error:
        message = one_line(error)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:  # our bug: a report needs the traceback
        traceback.print_exc()
        message = f"unexpected {type(error).__name__}; please report it"
    print(f"error: {message}", file=sys.stderr)
    return 2


def one_line(error: BaseException) -> str:
    message = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return " ".join(message.split()) or type(error).__name__


@contextmanager
def errors_about(what: object, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Raises the block's error as a CliError that names `what`."""
    try:
        yield
    except errors as error:
        message = one_line(error)
        if str(what) not in message:
            message = f"{what}: {message}"
        raise CliError(message) from error
