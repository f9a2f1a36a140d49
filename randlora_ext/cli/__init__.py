"""The command line: ``python -m randlora_ext``.

Exit code 0: done; 1: a check failed; 2: something to put right, told in one line, with nothing
half-written.
"""

from .command import main
from .files import CliError

__all__ = ["CliError", "main"]
