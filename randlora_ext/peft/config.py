"""`RandLoraConfig`: PEFT's, plus any density and bases that are saved as a seed."""

import os
import warnings
from dataclasses import dataclass
from typing import Any

import peft
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ..basis import BasisDescription
from ..checks import check_alpha, check_dropout, check_one_of, check_parameter_options, check_r
from ..nn.adapter_config import NEEDS_OURS, description_from_fields

_FLAGS = (
    "save_projection", "sparse", "very_sparse", "fan_in_fan_out", "init_weights", "inference_mode"
)  # fmt: skip
_TEXTS = "target_modules", "layers_pattern"
_LISTS = "modules_to_save", "target_parameters"
_OURS = "basis", "density", "target_parameters"


@dataclass
class RandLoraConfig(peft.RandLoraConfig):
    """PEFT's ``RandLoraConfig`` with all its fields, and three more.

    Args:
        basis: "peft" draws the bases that stock PEFT draws from ``projection_prng_key``.
            "hadamard" and "independent" generate those of docs/basis-spec.md on the device and
            save only the seed.
        density: share of non-zeros in independent bases, in (0, 1]; None means 1/3. Alone it means
            basis="independent". PEFT's own bases have its flags ``sparse`` and ``very_sparse``
            instead, Hadamard bases no zeros.
        target_parameters: as in PEFT's ``LoraConfig``, names of parameters to adapt, such as
            "experts.gate_up_proj": (experts, out, in), (experts, in, out) or (out, in). Only with
            basis="hadamard" and without dropout.

    With "hadamard" and "independent", ``projection_prng_key`` becomes a text that describes the
    bases, for example ``randlora_ext:independent-1:density=0.07:seed=42``. The text is complete: a
    configuration with this field alone has the same bases. Stock PEFT refuses the file: its
    ``peft_type`` says what to type, and PEFT's error quotes that.

    Raises:
        TypeError, ValueError: a field is not allowed, or contradicts another.
        RuntimeError: the key is a text, and `randlora_ext.peft.enable` has not been called.
    """

    density: float | None = None
    basis: str = "peft"
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        # A file may hold anything, and PEFT would fail on it halfway through changing a model.
        _check_types(self)
        check_r(self.r)
        check_alpha("randlora_alpha", self.randlora_alpha)
        generated = description_from_fields(vars(self))
        if generated is not None:
            self.save_projection = True  # else PEFT warns that bases may be lost
        super().__post_init__()
        if generated is not None:
            self.basis, self.density = generated.kind, generated.density
            key: Any = generated.key()
            self.projection_prng_key, self.save_projection = key, False
        if self.target_parameters:
            check_parameter_options(
                self.target_parameters, self.basis, self.density, self.randlora_dropout
            )
        if PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] is RandLoraConfig:
            return
        if generated is not None:
            raise RuntimeError(
                f"basis={self.basis!r} needs "
                "randlora_ext.peft.enable() to be called first; stock PEFT has no such bases"
            )
        warnings.warn(
            "randlora_ext.peft.enable() has not been called: until it is, a model of this "
            "configuration has PEFT's own layers, without our kernels",
            stacklevel=3,  # where the configuration is made
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """As PEFT's; the configuration remembers the folder, which errors then name."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        folder = os.fspath(pretrained_model_name_or_path)
        config.read_from = os.path.join(folder, subfolder) if subfolder else folder
        return config

    def to_dict(self) -> dict:
        """PEFT's dictionary, with our fields only if PEFT's cannot describe the bases."""
        values = super().to_dict()
        if self.basis == "peft":
            return {k: v for k, v in values.items() if k not in _OURS}
        return values | {"peft_type": NEEDS_OURS}


def description_of_config(config: peft.RandLoraConfig) -> BasisDescription | None:
    """What generates the adapter's bases; None if PEFT draws them. `RandLoraConfig` has derived it
    from its fields, and keeps it as the text of the key."""
    key: Any = config.projection_prng_key
    return BasisDescription.parse(key) if isinstance(key, str) else None


def target_parameters(config: peft.RandLoraConfig) -> list[str]:
    """Sorted; stock PEFT's configuration has none."""
    return sorted(getattr(config, "target_parameters", None) or ())


def _check_types(config: RandLoraConfig) -> None:
    """Raises TypeError or ValueError, naming the field, for a value that PEFT cannot use."""
    for name in _FLAGS:
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    for name in _TEXTS:
        value = getattr(config, name)
        if not isinstance(value, str) and not _is_list_or_none(value, str):
            raise TypeError(f"{name} must be a text, a list of texts or None, got {value!r}")
    for name in _LISTS:
        value = getattr(config, name)
        if not _is_list_or_none(value, str):
            raise TypeError(f"{name} must be a list of texts or None, got {value!r}")
    value = config.layers_to_transform
    is_index = isinstance(value, int) and not isinstance(value, bool)
    if not is_index and not _is_list_or_none(value, int):
        raise TypeError(f"layers_to_transform must be an integer, several or None, got {value!r}")
    check_dropout(config.randlora_dropout)
    check_one_of("bias", config.bias, ("none", "all", "randlora_only"))


def _is_list_or_none(value: Any, element: type) -> bool:
    if value is None:
        return True
    return isinstance(value, (list, tuple, set)) and all(isinstance(e, element) for e in value)
