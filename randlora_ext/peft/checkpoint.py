"""What of a file is looked at before a model takes it: its configuration, then its tensors."""

import dataclasses
import os

import peft
from peft.tuners.randlora.layer import RandLoraLayer
from torch import Tensor, nn

from .bases import BASES, misfit

DIAGONALS = ("randlora_lambda", "randlora_gamma")
# Fields that say which bases are drawn; the key's text holds the version of the specification.
_UNSAID = {"basis": "peft"}  # of a file that says nothing of it
RECIPE = ("projection_prng_key", "basis", "density", "sparse", "very_sparse")


class _Fields(peft.PeftConfig):
    """PEFT's finding and reading of adapter_config.json, without making a configuration of it."""

    @classmethod
    def from_peft_type(cls, **fields):
        return fields


def saved_fields(folder: str | os.PathLike, **hub) -> dict:
    """The fields of an adapter's configuration as they are in the file, and PEFT's defaults.

    Not an object: stock PEFT's class, in force before `enable`, would drop ``density``.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(peft.RandLoraConfig)}
    return defaults | _Fields.from_pretrained(folder, **hub)


def bases_misfits(config: peft.RandLoraConfig, saved: dict) -> list[str]:
    """What of a file's fields gives other bases than `config`; none where they are the same."""
    own, saved = _spelled_out(config.to_dict()), _spelled_out(saved)
    if _recipe(own) == _recipe(saved):
        return []
    return [
        f"{name} is {saved.get(name)!r}, not {own.get(name)!r}"
        for name in RECIPE
        if saved.get(name) != own.get(name)
    ]


def _spelled_out(fields: dict) -> dict:
    return fields | {k: value for k, value in _UNSAID.items() if fields.get(k) is None}


def _recipe(fields: dict) -> tuple:
    """Equal for fields that say the same in other words."""
    basis, density = fields["basis"], fields.get("density")
    if fields["very_sparse"]:
        density = "very_sparse"
    elif density is None and (fields["sparse"] or basis != "peft"):
        density = 1 / 3
    return fields["projection_prng_key"], basis, density


def check_fit(tuner: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Raises RuntimeError, naming each tensor that does not fit, before any of them is taken."""
    errors = []
    for name, own in _own_tensors(tuner, prefix):
        saved = state_dict.get(name)
        if saved is not None and (error := misfit(name, saved, own)):
            errors.append(error)
    if errors:
        raise RuntimeError(
            "the adapter does not fit the model, which is unchanged:\n\t" + "\n\t".join(errors)
        )


def _own_tensors(tuner: nn.Module, prefix: str):
    for bases in BASES:
        if getattr(tuner, bases).persistent:
            for adapter, basis in getattr(tuner, bases).items():
                yield f"{prefix}{bases}.{adapter}", basis
    for path, layer in tuner.named_modules():
        if isinstance(layer, RandLoraLayer):
            for diagonals in DIAGONALS:
                for adapter, parameter in getattr(layer, diagonals).items():
                    yield f"{prefix}{path}.{diagonals}.{adapter}", parameter


def drop_copies(state_dict: dict[str, Tensor], prefix: str) -> None:
    """Removes the copies of the bases that stock PEFT's files hold under every layer.

    They are those of the tuner, which are in the file as well, and packing each would take long.
    """
    of_tuner = {
        key.removeprefix(prefix)
        for key in state_dict
        if key.startswith(tuple(prefix + b for b in BASES))
    }
    for key in list(state_dict):
        name = key.removeprefix(prefix)
        if name not in of_tuner and any(name.endswith(f".{own}") for own in of_tuner):
            del state_dict[key]
