"""`RandLoraConfig`: PEFT's, plus any density and bases that are saved as a seed."""

import os
import warnings
from dataclasses import dataclass
from typing import Any

import peft
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..basis import BasisDescription
from ..basis.description import SPECIFICATIONS
from ..checks import check_alpha, check_dropout, check_integer, check_one_of, check_r, check_seed

# The type in files that stock PEFT cannot open: its error quotes a type that it does not know.
NEEDS_OURS = "RANDLORA; needs randlora_ext: import randlora_ext.peft; randlora_ext.peft.enable()"
_SPARSE = "sparse", "very_sparse"
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

    With "hadamard" and "independent", ``projection_prng_key`` is their seed. It becomes a text that
    describes them, such as ``randlora_ext:independent-1:density=0.07:seed=42``, which is complete:
    a configuration with this field alone has the same bases. Stock PEFT, which cannot generate
    them, fails on the text. It refuses a saved adapter with a KeyError that quotes the file's
    ``peft_type``, which says what to import.

    Raises:
        TypeError, ValueError: a field is not allowed, or contradicts another.
        RuntimeError: the bases are ours, and `randlora_ext.peft.enable` has not been called.
    """

    density: float | None = None
    basis: str = "peft"
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        # PEFT would fail on them halfway through changing a model.
        check_r(self.r)
        check_alpha("randlora_alpha", self.randlora_alpha)
        check_dropout(self.randlora_dropout)
        check_one_of("bias", self.bias, ("none", "all", "randlora_only"))
        for name in ("modules_to_save", "target_parameters"):
            value = getattr(self, name)
            if isinstance(value, str):  # its letters would be the names
                raise TypeError(f"{name} must be a list of names or None, got {value!r}")
        generated = self.basis_description
        if generated is not None:
            self.save_projection = True  # else PEFT warns that bases may be lost
        super().__post_init__()
        if generated is not None:
            self.basis, self.density = generated.kind, generated.density
            self.projection_prng_key = generated.key()
            self.save_projection = False
        if self.target_parameters and (self.basis != "hadamard" or self.randlora_dropout):
            raise ValueError(
                f"target_parameters {self.target_parameters!r} need basis='hadamard' and "
                f"randlora_dropout=0, got basis={self.basis!r}, "
                f"randlora_dropout={self.randlora_dropout}"
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
        """As PEFT's; the configuration remembers the folder, which errors then name.

        Raises ValueError, naming the file, if the tensors beside it are damaged: PEFT would first
        make the adapter.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        folder = os.fspath(pretrained_model_name_or_path)
        if subfolder:
            folder = os.path.join(folder, subfolder)
        config.read_from = folder
        tensors = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if os.path.isfile(tensors):
            try:
                with safe_open(tensors, "pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"{tensors} is damaged: {error}") from error
        return config

    @property
    def basis_description(self) -> BasisDescription | None:
        """What generates the bases, by the fields as they are now; None if PEFT draws them."""
        return _description(self)

    def to_dict(self) -> dict:
        """PEFT's dictionary, with our fields only if PEFT's cannot describe the bases."""
        values = super().to_dict()
        if self.basis_description is None:
            return {k: v for k, v in values.items() if k not in _OURS}
        return values | {"peft_type": NEEDS_OURS}


def description_of_config(config: peft.RandLoraConfig) -> BasisDescription | None:
    """What generates the adapter's bases; None if PEFT draws them, and of a configuration of stock
    PEFT."""
    return getattr(config, "basis_description", None)


def target_parameters(config: peft.RandLoraConfig) -> list[str]:
    """Sorted; stock PEFT's configuration has none."""
    return sorted(getattr(config, "target_parameters", None) or ())


def _description(config: RandLoraConfig) -> BasisDescription | None:
    """What generates the bases by a configuration's fields; None if PEFT draws them. TypeError or
    ValueError, naming the field, for what is not allowed.

    A text in ``projection_prng_key`` is complete; the other fields may only agree with it.
    """
    basis, density = config.basis, config.density
    seed_or_key: Any = config.projection_prng_key
    flags = [name for name in _SPARSE if getattr(config, name)]
    check_one_of("basis", basis, ("peft", *SPECIFICATIONS))
    if isinstance(seed_or_key, str):
        try:
            description = BasisDescription.parse(seed_or_key)
        except ValueError as error:
            raise ValueError(f"projection_prng_key: {error}") from error
        agrees = basis in ("peft", description.kind) and density in (None, description.density)
        if not agrees or flags:
            raise ValueError(
                f"projection_prng_key={seed_or_key!r} contradicts basis={basis!r}, "
                f"density={density}, flags {flags}; the text says all, give it alone"
            )
        return description
    if basis == "peft" and density is None:
        # As torch takes it.
        check_integer("projection_prng_key", seed_or_key, -(2**63), 2**64 - 1, "[-2**63, 2**64)")
        return None
    kind = "independent" if basis == "peft" else basis
    if flags:
        raise ValueError(f"{flags[0]} is of PEFT's own bases; basis={kind!r} takes a density")
    check_seed("projection_prng_key", seed_or_key)
    return BasisDescription(kind, density, seed_or_key)
