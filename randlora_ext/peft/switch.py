"""Putting our classes in the place of PEFT's, and back."""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import RandLoraConfig
from .model import AcceleratedRandLoraModel

_stock: tuple[type, type] | None = None


def enable() -> None:
    """From now on RandLoRA models made or loaded by PEFT run on the compiled kernels.

    Equivalent to editing PEFT's two tables, from the type RANDLORA to its tuner and its config:
    `get_peft_model`, `PeftModel.from_pretrained`, `inject_adapter_in_model` and transformers' own
    loading of adapters all look there. Models that exist already stay as they are. Calling it
    again changes nothing.

    Adapters are saved in PEFT's format: stock PEFT loads them, and the reverse; see
    `RandLoraConfig` for the one exception.
    """
    global _stock
    if _stock is None:
        _stock = (
            PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA],
            PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA],
        )
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] = RandLoraConfig
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = AcceleratedRandLoraModel


def disable() -> None:
    """Puts stock PEFT back for models made afterwards; those made in between keep our kernels."""
    global _stock
    if _stock is not None:
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] = _stock[0]
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = _stock[1]
        _stock = None
