"""Checks a state dict before torch copies anything from it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_record import AdapterRecord
from .base_layer import is_conv1d
from .merging import KeepsWeight

DIAGONALS = ("randlora_lambda", "randlora_gamma")
INPUT_SCALE = "randlora_input_scale"
MOST_TOLD = 10  # misfits in one message: every layer of a large model may have some
_GUARD = "_randlora_guard"  # of a model: the handle of its hook


def guard(model: nn.Module) -> None:
    """Registers `refuse_misfit` once on a model with RandLoRA layers: all are checked before the
    first one is loaded. Removes it from a model without such layers."""
    # An attribute, so that a copy of the model has the handle of its own hook.
    handle: Any = vars(model).pop(_GUARD, None)
    if handle is not None:
        handle.remove()
    if any(isinstance(module, KeepsWeight) for module in model.modules()):
        setattr(model, _GUARD, model.register_load_state_dict_pre_hook(refuse_misfit))


def refuse_misfit(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Pre-hook of ``load_state_dict`` for a layer with adapters, or for a model that holds some.

    torch copies what fits and then raises for the rest, which would mix two adapters. This raises a
    RuntimeError before, for an entry of such a layer whose shape differs or that is no floating
    point tensor, an input scale that is not positive and finite, or that is missing beside lambda
    or gamma, a record of another adapter, and a merged layer that has entries: the new lambda and
    gamma could not undo its merge. A layer that has several paths needs equal input scales at all
    of them. Other missing keys, and unknown ones, are left to torch, which knows whether loading is
    strict.
    """
    problems: list[str] = []
    advice: list[str] = []
    first: dict[nn.Module, str] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, KeepsWeight):
            at = f"{prefix}{path}." if path else prefix
            problems += _misfits(layer, state_dict, at)
            problems += _untied(layer, state_dict, first.setdefault(layer, at), at)
        if isinstance(layer, AdapterRecord):
            key = f"{prefix}{path}._extra_state"
            if key in state_dict and (found := layer.misfits(key, state_dict[key])):
                problems += found
                advice.append(layer.advice())
    refuse(problems, "the state dict", f"the {type(module).__name__}", RuntimeError, advice)


def refuse(
    problems: Iterable[str],
    what: str,
    place: str,
    error: type[Exception] = ValueError,
    advice: Iterable[str] = (),
) -> None:
    """Raises `error` if there are problems of putting `what` into `place`: the first ones, how many
    there are beside them, and advice. What many layers say alike is told once."""
    found = [*dict.fromkeys(problem for problem in problems if problem)]
    if not found:
        return
    told = found[:MOST_TOLD]
    if len(found) > MOST_TOLD:
        told.append(f"and {len(found) - MOST_TOLD} more")
    told += dict.fromkeys(advice)
    raise error(f"{what} does not fit {place}, which is unchanged:\n\t" + "\n\t".join(told))


def _misfits(layer: Any, state_dict: dict[str, Tensor], prefix: str) -> Iterator[str]:
    merged, base = layer.merged_adapters, layer.base_layer
    own: dict[str, Tensor] = {}
    for name in layer.randlora_lambda:
        own |= {f"{prefix}{part}.{name}": getattr(layer, part)[name] for part in DIAGONALS}
    for name in layer.randlora_input_scale:
        key, scale = f"{prefix}{INPUT_SCALE}.{name}", layer.randlora_input_scale[name]
        if key in state_dict:
            yield misfit_of_scale(key, state_dict[key], scale)
        elif any(f"{prefix}{part}.{name}" in state_dict for part in DIAGONALS):
            yield missing_scale(key)
    parts = *DIAGONALS, INPUT_SCALE
    forbidden = {f"{prefix}{part}.{name}" for part in parts for name in merged}
    based = f"{prefix}base_layer."
    # Below an outer layer of experts lie the adapters of an inner one.
    bases = [key for key in state_dict if key.startswith(based) and ".randlora_" not in key]
    if merged and (bases or forbidden & state_dict.keys()):
        at = prefix.removesuffix(".") or "the layer"
        yield f"{at} has merged {merged} into its weight; call unmerge() first"
    if type(base) is nn.Linear or is_conv1d(base):  # others may have a format of their own
        own |= {f"{based}{name}": value for name, value in base.named_parameters()}
    for key, parameter in own.items():
        if key in state_dict:
            yield misfit(key, state_dict[key], parameter)


def _untied(layer: Any, state_dict: dict[str, Tensor], first: str, prefix: str) -> Iterator[str]:
    """Input scales that differ at two paths of one layer, of which torch would keep the last."""
    for name in layer.randlora_input_scale:
        keys = [f"{at}{INPUT_SCALE}.{name}" for at in (first, prefix)]
        one, other = (state_dict.get(key) for key in keys)
        there = all(isinstance(scale, Tensor) and not scale.is_meta for scale in (one, other))
        if there and one is not other and not torch.equal(one, other):  # type: ignore[arg-type]
            yield f"{keys[1]} differs from {keys[0]}, and both are of one tied layer"


def misfit(key: str, saved: Any, own: Tensor) -> str:
    """Why the entry `saved` of a state dict cannot replace `own`; "" if it can."""
    if not isinstance(saved, Tensor):
        return f"{key} must be a tensor, got {type(saved).__name__}"
    if saved.shape != own.shape:
        return f"{key} is {tuple(saved.shape)}, and must be {tuple(own.shape)}"
    if saved.is_floating_point() == own.is_floating_point():
        return ""
    wanted = "floating point" if own.is_floating_point() else "an integer"
    return f"{key} is {saved.dtype}, and must be {wanted}"


def misfit_of_scale(key: str, saved: Any, own: Tensor) -> str:
    """As `misfit`, of an input scale, whose numbers must be positive and finite."""
    if error := misfit(key, saved, own):
        return error
    if saved.is_meta:
        return f"{key} has no numbers (meta device)"
    scale = saved.float()
    if bool(((scale > 0) & scale.isfinite()).all()):
        return ""
    return f"{key} must be positive and finite in every feature"


def missing_scale(key: str) -> str:
    return f"{key} is missing: adapters on Hadamard bases have one, of ones if not calibrated"
