"""RandLoRA of Hugging Face PEFT on the compiled kernels.

::

    import peft, randlora_ext.peft
    randlora_ext.peft.enable()
    config = randlora_ext.peft.RandLoraConfig(basis="hadamard", target_modules=...)
    model = peft.get_peft_model(model, config)

After `enable`, every RandLoRA model that PEFT makes or loads computes its layers with
`torch.ops.randlora`.
"""

import warnings

OLDEST, NEWEST = "0.21", "0.21"  # as noxfile.py tests
_WANTED = f"randlora_ext.peft needs PEFT {OLDEST} or newer: `pip install -U 'peft>={OLDEST}'`"
try:
    import peft
    from packaging.version import Version  # PEFT depends on it
except ModuleNotFoundError as error:
    raise ImportError(_WANTED) from error


def check_version() -> None:
    """Raises ImportError, saying what to install, if PEFT is too old; warns of newer ones."""
    found = Version(peft.__version__).release
    if found < Version(OLDEST).release:
        raise ImportError(f"{_WANTED}; found {peft.__version__}")
    if found[:2] > Version(NEWEST).release:
        warnings.warn(
            f"randlora_ext.peft is tested with PEFT {OLDEST} to {NEWEST}, found {peft.__version__}",
            stacklevel=3,
        )


check_version()

from .activation import disable, enable  # noqa: E402
from .config import RandLoraConfig  # noqa: E402
from .layer import kernel_summary  # noqa: E402

__all__ = [
    "RandLoraConfig",
    "disable",
    "enable",
    "kernel_summary",
]
