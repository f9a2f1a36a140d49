"""``python -m randlora_ext``: what a bug report needs, and a check of the kernels that run here."""

import sys

from .diagnostics import check

sys.exit(check())
