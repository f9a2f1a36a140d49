"""The reference of TRL's trainers, where they go on training an adapter that is there already.

DPO, KTO, GRPO and RLOO then add an adapter "ref" with the configuration of "default" and copy every
parameter whose name contains ".default." into it. Names of LoRA do; those of RandLoRA *end* in
".default", so "ref" stays as new, and the reference would silently be the base model. See
docs/upstream/trl-reference-adapter.md.
"""

import sys
import warnings
from typing import Any

import torch
from packaging.version import Version
from peft import PeftModel

from ..nn.state_dict import DIAGONALS
from .layer import layers_with

NEWEST_TRL = "1.16"  # as tests/peft/test_trl.py ran


def fill_reference(model: PeftModel, adapter_name: str, config: Any) -> None:
    """Copies "default" into an added adapter "ref" as TRL means to; leaves all others alone.

    TRL passes the configuration object of "default" itself. If it copies the numbers, too, as a
    mended version would, they are the same.
    """
    if (
        adapter_name != "ref"
        or config is not model.peft_config.get("default")
        or "trl" not in sys.modules
    ):
        return
    found = Version(sys.modules["trl"].__version__).release
    if found[:2] > Version(NEWEST_TRL).release:
        warnings.warn(
            'TRL\'s reference adapter "ref" is made a copy of "default", as TRL up to '
            f"{NEWEST_TRL} needs, and this is {'.'.join(map(str, found))}; the first loss of DPO "
            "must be ln 2 = 0.6931",
            stacklevel=4,
        )
    with torch.no_grad():
        for layer in layers_with(model, "ref").values():
            for diagonals in (getattr(layer, name) for name in DIAGONALS):
                diagonals["ref"].copy_(diagonals["default"])
