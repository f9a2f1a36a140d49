"""Putting our classes into PEFT's two tables, and taking them out again.

PEFT and transformers look tuners and configurations up there. Nothing of PEFT is wrapped or
replaced but these entries.
"""

import peft
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.randlora.model import RandLoraModel

from .config import NEEDS_OURS, RandLoraConfig
from .model import AcceleratedRandLoraModel


def enable() -> None:
    """From now on RandLoRA models made or loaded by PEFT run on the compiled kernels.

    Equivalent to editing PEFT's two tables, from the type RANDLORA to its tuner and its
    configuration. Models that exist already stay as they are.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] = RandLoraConfig
    PEFT_TYPE_TO_CONFIG_MAPPING[NEEDS_OURS] = RandLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = AcceleratedRandLoraModel


def disable() -> None:
    """Puts stock PEFT back into its tables. Models made in between keep our kernels."""
    PEFT_TYPE_TO_CONFIG_MAPPING.pop(NEEDS_OURS, None)
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] = peft.RandLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = RandLoraModel
