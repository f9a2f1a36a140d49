"""Checks of what is loaded into an adapted layer, before anything is copied into it."""

from collections.abc import Iterator, Mapping
from typing import Any

from .adapter_record import RECORD, other_adapter
from .input_scale import input_scale_misfits, tensor_misfits
from .merging import Mergeable

DIAGONALS = ("randlora_lambda", "randlora_gamma")
INPUT_SCALE = "randlora_input_scale"
MOST_TOLD = 10  # misfits in one message: every layer of a large model may have some


def refuse_misfits(
    layers: Mapping[str, Mergeable], state_dict: Mapping[str, Any], what: str
) -> None:
    """Raises RuntimeError if entries of a state dict do not fit the layers with these paths.

    torch copies what fits and then raises for the rest, which would mix two adapters. Refused are
    an entry of an adapter whose shape differs or that is no floating point tensor, an input scale
    that is not positive and finite or that is missing beside lambda or gamma, a record of another
    adapter, and entries of a merged adapter or of the weight that holds it: the new lambda and
    gamma could not undo its merge. Other missing keys, and unknown ones, are left to torch, which
    knows whether loading is strict.

    Args:
        what: is said not to fit.
    """
    problems: list[str] = []
    of_another: list[str] = []
    for path, layer in layers.items():
        prefix = f"{path}." if path else ""
        problems += _misfits(layer, state_dict, prefix)
        of_another += _other_records(layer, state_dict, prefix)
    if of_another:
        problems.append(other_adapter(of_another))
    if not problems:
        return
    lines = problems[-MOST_TOLD:]  # records come last
    if len(problems) > MOST_TOLD:
        lines.insert(0, f"{len(problems) - MOST_TOLD} more, and")
    raise RuntimeError(f"{what} does not fit:\n\t" + "\n\t".join(lines))


def _misfits(layer: Mergeable, state_dict: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, lam in layer.randlora_lambda.items():
        lam_key, gam_key = (f"{prefix}{diagonal}.{name}" for diagonal in DIAGONALS)
        for key, own in ((lam_key, lam), (gam_key, layer.randlora_gamma[name])):
            if key in state_dict:
                yield from tensor_misfits(key, state_dict[key], own)
        if name not in layer.randlora_input_scale:
            continue
        key = f"{prefix}{INPUT_SCALE}.{name}"
        if key in state_dict:
            yield from input_scale_misfits(key, state_dict[key], layer.randlora_input_scale[name])
        elif lam_key in state_dict or gam_key in state_dict:
            yield f"{key} is missing: an adapter on Hadamard bases has one, of ones if uncalibrated"
    if layer.merged:
        parts = *DIAGONALS, INPUT_SCALE
        merged = {f"{prefix}{part}.{name}" for part in parts for name in layer.merged_adapters}
        inside = f"{prefix}base_layer."
        if any(key in merged or key.startswith(inside) for key in state_dict):
            path = prefix.removesuffix(".") or "the layer"
            yield f"{path} has merged {layer.merged_adapters} into its weight; call unmerge() first"


def _other_records(layer: Mergeable, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    found = []
    for name, record in layer.randlora_record.items():
        key = f"{prefix}{RECORD}.{name}._extra_state"
        if key in state_dict:
            found += record.misfits(key, state_dict[key])
        elif any(f"{prefix}{diagonal}.{name}" in state_dict for diagonal in DIAGONALS):
            found.append(f"{key} is missing, which says what the tensors belong to")
    return found
