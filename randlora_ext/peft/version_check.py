"""Whether a usable PEFT is installed."""

import importlib
import warnings

OLDEST, NEWEST = "0.18", "0.21"  # as noxfile.py tests


def check_version() -> None:
    """Raises ImportError, saying what to install, if PEFT is missing or older than 0.18.

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
