"""What the commands of `randlora_cli` do: one module each, with a function of that name."""

import sys
import traceback
from importlib import import_module
from typing import Any

from .files import CliError, first_line

__all__ = ["CliError", "run"]


def run(command: str, **options: Any) -> int:
    """Runs one command; returns the exit code.

    0: done; 1: a check failed; 2: something to fix, named in one line, with nothing
    half-written.
    """
    try:
        return getattr(import_module(f".{command}", __package__), command)(**options)
    except ImportError as error:
        told = (
            f"{command} needs another package: {first_line(error)}; "
            'pip install "randlora-ext[peft]" brings all'
        )
    except (CliError, OSError) as error:
        told = first_line(error)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:  # our bug: a report needs the traceback
        traceback.print_exc()
        told = f"unexpected {type(error).__name__}; please report it"
    print(f"error: {told}", file=sys.stderr)
    return 2
