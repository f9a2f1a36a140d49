"""Checks a state dict before torch copies anything of it."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .base_layer import is_conv1d

DIAGONALS = ("randlora_lambda", "randlora_gamma")


def refuse_misfit(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Pre-hook of ``load_state_dict`` for a `RandLoraLinear`, or for a model that holds some.

    torch copies what fits and then raises for the rest. That would leave half of one adapter mixed
    with another.

    Raises RuntimeError, naming every entry for a RandLoRA layer that has another shape, is not
    floating point or no tensor, and every layer that is merged: its weight holds an adapter that
    the new lambda and gamma could not take out again. Missing and unknown keys are left to torch,
    which alone knows whether the caller said strict.
    """
    problems = [
        problem
        for path, layer in module.named_modules(remove_duplicate=False)
        if all(hasattr(layer, name) for name in (*DIAGONALS, "base_layer"))
        for problem in _misfits(layer, state_dict, f"{prefix}{path}." if path else prefix)
    ]
    if problems:
        raise RuntimeError(
            f"the state dict does not fit the {type(module).__name__}, which is unchanged:\n\t"
            + "\n\t".join(problems)
        )


def _misfits(layer: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> Iterator[str]:
    own = {
        f"{prefix}{diagonals}.{adapter}": parameter
        for diagonals in DIAGONALS
        for adapter, parameter in getattr(layer, diagonals).items()
    }
    base: Any = layer.base_layer
    if type(base) is nn.Linear or is_conv1d(base):  # others may have a format of their own
        own |= {f"{prefix}base_layer.{name}": value for name, value in base.named_parameters()}
    taken = [key for key in own if state_dict.get(key) is not None]
    if taken and getattr(layer, "merged", False):
        yield (
            f"{prefix.removesuffix('.') or 'the layer'} has merged {layer.merged_adapters} into "
            "its weight; call unmerge() first"
        )
    for key in taken:
        saved, parameter = state_dict[key], own[key]
        if not isinstance(saved, Tensor):
            yield f"{key} must be a tensor, got {type(saved).__name__}"
        elif saved.shape != parameter.shape:
            yield f"{key} is {tuple(saved.shape)}, and must be {tuple(parameter.shape)}"
        elif not saved.is_floating_point():
            yield f"{key} is {saved.dtype}, and must be floating point"
