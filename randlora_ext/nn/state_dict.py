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
    handle = vars(model).pop(_GUARD, None)
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
            layer_prefix = f"{prefix}{path}." if path else prefix
            first_prefix = first.setdefault(layer, layer_prefix)
            problems += _misfits(layer, state_dict, layer_prefix)
            problems += _untied(layer, state_dict, first_prefix, layer_prefix)
        if isinstance(layer, AdapterRecord):
            key = f"{prefix}{path}._extra_state"
            found = layer.misfits(key, state_dict[key]) if key in state_dict else []
            if found:
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
    found = [*dict.fromkeys(problems)]
    if not found:
        return
    lines = found[:MOST_TOLD]
    if len(found) > MOST_TOLD:
        lines.append(f"and {len(found) - MOST_TOLD} more")
    lines += dict.fromkeys(advice)
    raise error(f"{what} does not fit {place}, which is unchanged:\n\t" + "\n\t".join(lines))


def _misfits(layer: KeepsWeight, state_dict: dict[str, Tensor], prefix: str) -> Iterator[str]:
    expected: dict[str, Tensor] = {}
    for name, lam in layer.randlora_lambda.items():
        lam_key, gam_key = (f"{prefix}{diagonal}.{name}" for diagonal in DIAGONALS)
        expected[lam_key], expected[gam_key] = lam, layer.randlora_gamma[name]
        if name not in layer.randlora_input_scale:
            continue
        key = f"{prefix}{INPUT_SCALE}.{name}"
        if key in state_dict:
            own = layer.randlora_input_scale[name]
            yield from input_scale_misfits(key, state_dict[key], own)
        elif lam_key in state_dict or gam_key in state_dict:
            yield missing_input_scale(key)
    yield from _merged_misfit(layer, state_dict, prefix)
    base = layer.base_layer
    if type(base) is nn.Linear or is_conv1d(base):  # others may have a format of their own
        parameters = base.named_parameters()
        expected |= {f"{prefix}base_layer.{name}": value for name, value in parameters}
    for key, own in expected.items():
        if key in state_dict:
            yield from tensor_misfits(key, state_dict[key], own)


def _merged_misfit(layer: KeepsWeight, state_dict: dict[str, Tensor], prefix: str) -> Iterator[str]:
    """Entries of the weight into which adapters are merged, or of these adapters."""
    if not layer.merged:
        return
    parts = *DIAGONALS, INPUT_SCALE
    adapters = [f"{prefix}{part}.{name}" for part in parts for name in layer.merged_adapters]
    # Below an outer layer of experts lie the adapters of an inner one.
    in_base = [key for key in state_dict if key.startswith(f"{prefix}base_layer.")]
    of_base = [key for key in in_base if ".randlora_" not in key]
    if of_base or any(key in state_dict for key in adapters):
        path = prefix.removesuffix(".") or "the layer"
        yield f"{path} has merged {layer.merged_adapters} into its weight; call unmerge() first"


def _untied(
    layer: KeepsWeight, state_dict: dict[str, Tensor], first: str, prefix: str
) -> Iterator[str]:
    """Input scales that differ at two paths of one layer, of which torch would keep the last."""
    for name in layer.randlora_input_scale:
        first_key, key = f"{first}{INPUT_SCALE}.{name}", f"{prefix}{INPUT_SCALE}.{name}"
        one, other = state_dict.get(first_key), state_dict.get(key)
        if one is other or not isinstance(one, Tensor) or not isinstance(other, Tensor):
            continue
        if not one.is_meta and not other.is_meta and not torch.equal(one, other):
            yield f"{key} differs from {first_key}, and both are of one tied layer"


def tensor_misfits(key: str, saved: Any, own: Tensor) -> list[str]:
    """Why the entry `saved` of a state dict cannot replace `own`; empty if it can."""
    if not isinstance(saved, Tensor):
        return [f"{key} must be a tensor, got {type(saved).__name__}"]
    if saved.shape != own.shape:
        return [f"{key} is {tuple(saved.shape)}, and must be {tuple(own.shape)}"]
    if saved.is_floating_point() != own.is_floating_point():
        wanted = "floating point" if own.is_floating_point() else "an integer"
        return [f"{key} is {saved.dtype}, and must be {wanted}"]
    return []


def input_scale_misfits(key: str, saved: Any, own: Tensor) -> list[str]:
    """As `tensor_misfits`, of an input scale, whose numbers must be positive and finite."""
    problems = tensor_misfits(key, saved, own)
    if problems:
        return problems
    if saved.is_meta:
        return [f"{key} has no numbers (meta device)"]
    numbers = saved.float()
    if not bool(((numbers > 0) & numbers.isfinite()).all()):
        return [f"{key} must be positive and finite in every feature"]
    return []


def missing_input_scale(key: str) -> str:
    return f"{key} is missing: adapters on Hadamard bases have one, of ones if not calibrated"
