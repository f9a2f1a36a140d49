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
    """Raises ImportError, saying what to install, if PEFT is missing or too old.

    Warns if it is newer than what was tested.
    """
    try:
        peft = importlib.import_module("peft")
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError(
            "randlora_ext.peft needs Hugging Face PEFT, which is not installed; install it with "
            f"`pip install 'peft>={OLDEST}'`"
        ) from error
    from packaging.version import Version  # PEFT depends on it

    found = Version(peft.__version__).release
    if found < Version(OLDEST).release:
        raise ImportError(
            f"randlora_ext.peft needs PEFT {OLDEST} or newer, found {peft.__version__}; install it "
            f"with `pip install -U 'peft>={OLDEST}'`"
        )
    if found[:2] > Version(NEWEST).release:
        warnings.warn(
            f"randlora_ext.peft is tested with PEFT {OLDEST} to {NEWEST}, found "
            f"{peft.__version__}; if it fails or differs from stock PEFT, please tell us",
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
