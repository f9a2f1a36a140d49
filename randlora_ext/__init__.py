"""RandLoRA, full-rank fine-tuning, on compiled kernels for PyTorch and PEFT.

`y = x W^T + bias + scaling * x (B (lambda * A * gamma))^T` with fixed random bases A and B and
trained diagonals lambda and gamma. See README.md, docs/math.md and docs/ops.md.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch as _torch  # noqa: F401  (first: _C needs its libraries)

if importlib.util.find_spec("randlora_ext._C") is None:
    raise ImportError(
        f"randlora_ext was found at {Path(__file__).parent}, but its compiled part was not. In a "
        "checkout of the sources either install with `pip install --no-build-isolation -e .`, or "
        "run from another folder than the checkout so that the installed package is found."
    )

from ._C import build_info as _build_info
from ._C import isa as _isa
from .basis import Basis
from .calibration import calibrate
from .devices import CUDA_STATUS as _CUDA_STATUS
from .dial import set_dial
from .forgetting_meter import forgetting
from .nn.linear import RandLoraLinear
from .ops.functional import delta_weight, linear

if TYPE_CHECKING:
    from .budget import ForgettingBudget as ForgettingBudget

__version__: str = _build_info()["version"]


def build_info() -> dict:
    """How the compiled part was built, and which kernels serve the CPU and CUDA here."""
    return {**_build_info(), "isa": _isa(), "cuda": _CUDA_STATUS}


def __getattr__(name: str) -> Any:
    if name == "ForgettingBudget":  # imported when asked for: it needs transformers
        from .budget import ForgettingBudget

        return ForgettingBudget
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "RandLoraLinear",
    "Basis",
    "__version__",
    "build_info",
    "calibrate",
    "delta_weight",
    "forgetting",
    "linear",
    "set_dial",
]
