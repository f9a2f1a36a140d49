"""Whether a usable PEFT is installed."""

import importlib
import warnings

OLDEST, NEWEST = "0.18", "0.21"  # as noxfile.py tests


def check_peft() -> None:
    """Raises ImportError, telling what to install, where PEFT is missing or older than 0.18.

    Warns where it is newer than what was tested.
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

    if Version(peft.__version__).release[:2] > Version(NEWEST).release:
        warnings.warn(
            f"randlora_ext.peft is tested with PEFT {OLDEST} to {NEWEST}, found "
            f"{peft.__version__}; "
            "where it fails or differs from stock PEFT, please tell us",
            stacklevel=3,
        )
    if Version(peft.__version__).release < Version(OLDEST).release:
        raise ImportError(
            f"randlora_ext.peft needs PEFT {OLDEST} or newer, found {peft.__version__}; install it "
            f"with `pip install -U 'peft>={OLDEST}'`"
        )
