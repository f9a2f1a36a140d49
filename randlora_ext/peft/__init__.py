"""RandLoRA of Hugging Face PEFT on the compiled kernels.

::

    import peft, randlora_ext.peft
    randlora_ext.peft.enable()
    model = peft.get_peft_model(model, peft.RandLoraConfig(sparse=True, target_modules=...))

After `enable`, every RandLoRA model that PEFT makes or loads computes its layers with
`torch.ops.randlora`. If its bases are ternary (``sparse``, ``very_sparse``, or a ``density`` of
`RandLoraConfig`), they are kept packed in 2 bits an element or less, and the numbers are those of
stock PEFT up to rounding. `accelerate` does the same to a model that exists already.
"""

import importlib
import warnings

OLDEST, NEWEST = "0.20", "0.21"  # as noxfile.py tests


def check_version() -> None:
    """Raises ImportError, saying what to install, if PEFT is missing or too old; warns of newer."""
    wanted = f"randlora_ext.peft needs PEFT {OLDEST} or newer: `pip install -U 'peft>={OLDEST}'`; "
    try:
        version = importlib.import_module("peft").__version__
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError(wanted + "it is not installed") from error
    from packaging.version import Version  # PEFT depends on it

    found = Version(version).release
    if found < Version(OLDEST).release:
        raise ImportError(f"{wanted}found {version}")
    if found[:2] > Version(NEWEST).release:
        warnings.warn(
            f"randlora_ext.peft is tested with PEFT {OLDEST} to {NEWEST}, found {version}; if it "
            "fails or differs from stock PEFT, please tell us",
            stacklevel=3,
        )


check_version()

from .activation import accelerate, disable, enable  # noqa: E402
from .config import RandLoraConfig  # noqa: E402
from .layer import kernel_summary  # noqa: E402
from .loading import hotswap_adapter  # noqa: E402
from .saving import export_to_peft  # noqa: E402

__all__ = [
    "RandLoraConfig",
    "accelerate",
    "disable",
    "enable",
    "export_to_peft",
    "hotswap_adapter",
    "kernel_summary",
]
