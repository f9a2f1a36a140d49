"""The command line: ``python -m randlora_ext``.

Without an option it prints what a bug report needs and checks the kernels (`check`); ``--inspect``,
``--convert``, ``--merge`` and ``--bench`` are a module each. Exit code 0: done; 1: a check failed;
2: something to put right, told in one line, with nothing half-written.
"""

from .errors import CliError
from .options import main

__all__ = ["CliError", "main"]
