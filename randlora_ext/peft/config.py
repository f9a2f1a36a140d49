"""`RandLoraConfig`: PEFT's configuration with a free density."""

from dataclasses import dataclass, field

import peft
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING


@dataclass
class RandLoraConfig(peft.RandLoraConfig):
    """PEFT's ``RandLoraConfig`` (all its fields), and ``density``.

    Args:
        density: None (as PEFT), or the share of non-zeros of the ternary bases, in (0, 1]. The
            bases are then drawn as PEFT draws its sparse ones, from ``projection_prng_key``, with
            1 / density in the place of PEFT's ``sparsity``; 1/3 gives those of ``sparse=True``.

    The density is saved in adapter_config.json and restored by ``PeftModel.from_pretrained`` while
    `randlora_ext.peft.enable` is in force.

    **Stock PEFT does not know the field.** It drops it with a warning, and without saved
    projections (``save_projection=False``) it would go on with other bases, hence another model.
    It reads correctly what was saved with ``save_projection=True``, with density None, or with
    density 1/3 (which is saved as ``sparse=True`` beside the density).

    Raises:
        TypeError, ValueError: where density is no number in (0, 1], or contradicts sparse or
            very_sparse. RuntimeError: where density is given before `enable`, since stock PEFT
            would ignore it.
    """

    density: float | None = field(
        default=None,
        metadata={"help": "Share of non-zeros in the ternary bases, in (0, 1]; None: as PEFT"},
    )

    def __post_init__(self) -> None:
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
        if PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] is not RandLoraConfig:
            raise RuntimeError(
                f"density={self.density} needs randlora_ext.peft.enable() to be called first; "
                "stock PEFT would ignore it"
            )

    def _is_sparse_of_peft(self) -> bool:
        return self.density is not None and 1 / self.density == 3

    def to_dict(self) -> dict:
        """PEFT's dictionary; what stock PEFT can express is said in its words."""
        values = super().to_dict()
        if self.density is None:
            del values["density"]
        elif self._is_sparse_of_peft():
            values["sparse"] = True
        return values
