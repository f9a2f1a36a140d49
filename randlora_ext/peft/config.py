"""`RandLoraConfig`: PEFT's configuration with a free density and bases that are a seed."""

import os
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import peft
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ..basis.description import SPECIFICATIONS, BasisDescription
from .files import written_whole

BASES = ("peft", *SPECIFICATIONS)


@dataclass
class RandLoraConfig(peft.RandLoraConfig):
    """PEFT's ``RandLoraConfig`` (all its fields), ``density`` and ``basis``.

    Args:
        density: None (as PEFT), or the share of non-zeros of the ternary bases, in (0, 1]. The
            bases are then drawn as PEFT draws its sparse ones, from ``projection_prng_key``, with
            1 / density in the place of PEFT's ``sparsity``; 1/3 gives those of ``sparse=True``.
        basis: "peft", the same numbers as stock PEFT's for the same key; or "independent", bases of
            the specification docs/basis-spec.md: made on the device from ``projection_prng_key``
            and the density (1/3 where neither density nor very_sparse is given), never drawn dense,
            never saved.

    They are saved in adapter_config.json and restored by ``PeftModel.from_pretrained`` while
    `randlora_ext.peft.enable` is in force.

    **Stock PEFT does not know the field.** It drops it with a warning, and without saved
    projections (``save_projection=False``) it would go on with other bases, hence another model.
    It reads correctly what was saved with ``save_projection=True``, with density None, or with
    density 1/3 (which is saved as ``sparse=True`` beside the density). It refuses a generated
    basis: the key is then written as text, "generated-1:KEY" with the version of the
    specification, which no generator of torch's takes; `export_to_peft` writes such an adapter
    with projections.

    Raises:
        TypeError, ValueError: if r, randlora_alpha or basis cannot be, if density is no number
            in (0, 1] or contradicts sparse or very_sparse.
            RuntimeError: where density is given before `enable`, since stock PEFT would ignore it.
    """

    density: float | None = field(
        default=None,
        metadata={"help": "Share of non-zeros in the ternary bases, in (0, 1]; None: as PEFT"},
    )
    basis: str = field(
        default="peft",
        metadata={"help": '"peft": bases as stock PEFT draws them; "independent": never stored'},
    )

    def __post_init__(self) -> None:
        given: Any = self.projection_prng_key  # type: ignore[has-type]
        if isinstance(given, str):
            self.projection_prng_key = _key_of(given)
        # A file may hold anything, and PEFT would meet it in the middle of changing a model.
        if isinstance(self.r, bool) or not isinstance(self.r, int) or not 0 < self.r < 2**31:
            raise ValueError(f"r must be an integer in [1, 2**31), got {self.r!r}")
        alpha: Any = self.randlora_alpha
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or alpha != alpha:
            raise ValueError(f"randlora_alpha must be a number, got {alpha!r}")
        if self.basis not in BASES:
            raise ValueError(f"basis must be one of {BASES}, got {self.basis!r}")
        if self.basis != "peft":
            self.save_projection = False  # and without the warning that they are not saved
            key = self.projection_prng_key
            if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 2**64:
                raise ValueError(f"projection_prng_key must be in [0, 2**64), got {key!r}")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Specified to not save")
                super().__post_init__()
            self._check_enabled(f"basis={self.basis!r}")
            if self.density is not None:
                self.density = BasisDescription(self.basis, self.density, key).density
        else:
            super().__post_init__()
        if self.density is None:
            return
        if isinstance(self.density, bool) or not isinstance(self.density, (int, float)):
            raise TypeError(f"density must be None or a number in (0, 1], got {self.density!r}")
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must be None or in (0, 1], got {self.density}")
        if self.very_sparse or (self.sparse and not self._is_sparse_of_peft()):
            raise ValueError(
                f"density={self.density} contradicts sparse={self.sparse}, very_sparse="
                f"{self.very_sparse}; give either a density or one of the flags"
            )
        self._check_enabled(f"density={self.density}")

    def _check_enabled(self, what: str) -> None:
        if PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] is not RandLoraConfig:
            raise RuntimeError(
                f"{what} needs randlora_ext.peft.enable() to be called first; stock PEFT would "
                "ignore it"
            )

    def _is_sparse_of_peft(self) -> bool:
        return self.density is not None and 1 / self.density == 3

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As PEFT's, but the file appears when it is complete: it says which bases were drawn."""
        if os.path.isfile(save_directory):
            return super().save_pretrained(save_directory, **kwargs)  # PEFT's own error
        with written_whole(save_directory) as scratch:
            super().save_pretrained(scratch, **kwargs)

    def to_dict(self) -> dict:
        """PEFT's dictionary; what stock PEFT can express is said in its words."""
        values = super().to_dict()
        if self.basis == "peft":
            del values["basis"]
        else:
            values["projection_prng_key"] = f"generated-1:{self.projection_prng_key}"
        if self.density is None:
            del values["density"]
        elif self._is_sparse_of_peft():
            values["sparse"] = True
        return values


def _key_of(text: str) -> int:
    match = re.fullmatch(r"generated-(\d+):(\d+)", text)
    if match is None or int(match[1]) != 1:
        raise ValueError(
            f"projection_prng_key is {text!r}; this version of randlora_ext reads an integer or "
            "'generated-1:KEY'"
        )
    return int(match[2])
