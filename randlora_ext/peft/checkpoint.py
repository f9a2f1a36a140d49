"""What a tuner does with a state dict before its layers see it."""

from peft.tuners.randlora.layer import RandLoraLayer
from torch import Tensor, nn

from .bases import BASES, misfit

DIAGONALS = ("randlora_lambda", "randlora_gamma")


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
