"""Whether a usable PEFT is installed."""

import importlib

OLDEST = "0.18"


def check_peft() -> None:
    """Raises ImportError, telling what to install, where PEFT is missing or older than 0.18."""
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

    if Version(peft.__version__).release < Version(OLDEST).release:
        raise ImportError(
            f"randlora_ext.peft needs PEFT {OLDEST} or newer, found {peft.__version__}; install it "
            f"with `pip install -U 'peft>={OLDEST}'`"
        )
