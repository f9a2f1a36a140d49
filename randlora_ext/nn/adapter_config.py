"""The fields of adapter_config.json that decide what an adapter computes, read without PEFT."""

from collections.abc import Mapping
from typing import Any

from ..basis import BasisDescription
from ..basis.description import SPECIFICATIONS
from ..checks import check_alpha, check_dropout, check_integer, check_one_of, check_r, check_seed

# The type in files that stock PEFT cannot open: its error quotes a type that it does not know.
NEEDS_OURS = "RANDLORA; needs randlora_ext: import randlora_ext.peft; randlora_ext.peft.enable()"
PEFT_TYPES = ("RANDLORA", NEEDS_OURS)
SPARSE = "sparse", "very_sparse"
_FLAGS = (*SPARSE, "save_projection", "fan_in_fan_out")
_LISTS = "modules_to_save", "target_parameters"
# PEFT's, of fields that a file lacks.
_DEFAULTS = {
    "r": 32, "randlora_alpha": 640, "randlora_dropout": 0.0, "projection_prng_key": 0,
    "save_projection": True, "sparse": False, "very_sparse": False, "fan_in_fan_out": False,
    "modules_to_save": None, "target_parameters": None, "basis": "peft", "density": None,
}  # fmt: skip


def fields_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `saved` that matter here, and PEFT's defaults for those that it lacks.

    Raises TypeError or ValueError, naming the field, for a value that is not allowed; those of the
    bases are checked by `description_from_fields`.
    """
    peft_type = saved.get("peft_type")
    if peft_type not in PEFT_TYPES:
        raise ValueError(f"peft_type must be RANDLORA, got {peft_type!r}")
    fields = {name: saved.get(name, default) for name, default in _DEFAULTS.items()}
    check_r(fields["r"])
    check_alpha("randlora_alpha", fields["randlora_alpha"])
    check_dropout(fields["randlora_dropout"])
    for name in _FLAGS:
        if not isinstance(fields[name], bool):
            raise TypeError(f"{name} must be True or False, got {fields[name]!r}")
    for name in _LISTS:
        value = fields[name]
        is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
        if value is not None and not is_list:
            raise TypeError(f"{name} must be a list of texts or None, got {value!r}")
    return fields


def description_from_fields(fields: Mapping[str, Any]) -> BasisDescription | None:
    """What generates an adapter's bases by the fields of its configuration, ours or PEFT's; None if
    PEFT draws them. TypeError or ValueError, naming the field, for what is not allowed.

    A configuration in memory derives it once (`peft.config.RandLoraConfig`), and so does a saved
    adapter (`SavedAdapter`).

    A text in ``projection_prng_key`` is complete; the other fields may only agree with it.
    """
    basis, density = fields.get("basis", "peft"), fields.get("density")
    seed_or_key = fields["projection_prng_key"]
    flags = [name for name in SPARSE if fields.get(name)]
    check_one_of("basis", basis, ("peft", *SPECIFICATIONS))
    BasisDescription("independent", density, 0)  # whether it is a density
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
