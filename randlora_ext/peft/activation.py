"""Putting our classes into PEFT's two tables, and taking them out again.

PEFT and transformers look tuners and configurations up there. Nothing of PEFT is wrapped or
replaced but these entries.
"""

import peft
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.randlora.model import RandLoraModel

from .config import NEEDS_OURS, RandLoraConfig
from .layer import AcceleratedLinear
from .model import AcceleratedRandLoraModel


def enable(float32_products: bool | None = None) -> None:
    """From now on RandLoRA models made or loaded by PEFT run on the compiled kernels.

    Equivalent to editing PEFT's two tables, from the type RANDLORA to its tuner and its
    configuration. Models that exist already stay as they are.

    Args:
        float32_products: whether dense bases (PEFT's default) are multiplied in float32 in 16-bit
            models, as stock PEFT does at several times the cost, and not in 16 bits with float32
            sums, the default. It holds for all models, those that exist included, until a call
            gives another value: None leaves it as it is.
    """
    if float32_products is not None:
        AcceleratedLinear.float32_products = float32_products
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] = RandLoraConfig
    PEFT_TYPE_TO_CONFIG_MAPPING[NEEDS_OURS] = RandLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = AcceleratedRandLoraModel


def disable() -> None:
    """Puts stock PEFT back into its tables. Models made in between keep our kernels."""
    PEFT_TYPE_TO_CONFIG_MAPPING.pop(NEEDS_OURS, None)
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] = peft.RandLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = RandLoraModel
