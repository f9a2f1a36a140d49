"""Loading over an existing adapter: what does not fit is refused before anything changes."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import fields as dataclass_fields
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights

from ..nn.adapter_config import PEFT_TYPES
from ..nn.base_layer import first
from ..nn.linear import check_alpha
from ..nn.state_dict import DIAGONALS, INPUT_SCALE, misfit, misfit_of_scale, refuse
from .bases import BASIS_NAMES
from .config import one_save, other_bases
from .layer import layers_with
from .model import AcceleratedRandLoraModel


def hotswap_adapter(
    model: PeftModel,
    model_name_or_path: str | os.PathLike,
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs,
) -> None:
    """Overwrites adapter `adapter_name` by a saved one, in the same parameters.

    Equivalent to ``peft.utils.hotswap.hotswap_adapter``, which supports only LoRA: no parameter is
    replaced, so optimizers stay valid; the scaling becomes the file's.
    ``model.load_adapter(folder, adapter_name)`` also writes into the parameters, but keeps the
    adapter's own scaling, and accepts a file that lacks tensors.

    Args:
        model: a PeftModel on our layers.
        model_name_or_path: a folder or repository with an adapter; kwargs as PEFT's
            ``load_adapter`` takes them (subfolder, revision, token).
        torch_device: where the file is read to; default the CPU.

    Raises, and leaves the model as it was: TypeError for another model; RuntimeError if the adapter
    is merged; TypeError or ValueError if the file's alpha is no finite number; ValueError if the
    adapter is not there or, naming each thing, if the file has another type, r or dropout, other
    tensors or shapes, or brings no bases and belongs to other ones.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, AcceleratedRandLoraModel):
        raise TypeError(
            f"hotswap_adapter needs a PeftModel on randlora_ext's layers, got {type(model)}; see "
            "enable() and accelerate()"
        )
    layers = layers_with(model, adapter_name).values()
    with one_save(model_name_or_path, kwargs) as place:
        fields = _SavedFields.from_pretrained(place, **kwargs)
        saved = load_peft_weights(place, device=torch_device or "cpu", **kwargs)
    check_alpha("randlora_alpha", fields["randlora_alpha"])
    errors = _hotswap_errors(model, adapter_name, fields, saved)
    refuse(errors, f"the adapter of {place!r}", repr(adapter_name))
    scaling = fields["randlora_alpha"] / model.peft_config[adapter_name].r
    peft.set_peft_model_state_dict(model, saved, adapter_name=adapter_name)
    for layer in layers:
        layer.scaling[adapter_name] = scaling
    model.peft_config[adapter_name].randlora_alpha = fields["randlora_alpha"]


def _hotswap_errors(
    model: PeftModel, adapter_name: str, fields: dict, saved: dict[str, torch.Tensor]
) -> Iterator[str]:
    if fields["peft_type"] not in PEFT_TYPES:
        yield f"peft_type is {fields['peft_type']}, not {PEFT_TYPES[0]}"
        return
    own = peft.get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=False
    )
    config = model.peft_config[adapter_name]
    for name in ("r", "randlora_dropout"):
        if fields[name] != getattr(config, name):
            yield f"{name} is {fields[name]!r}, not {getattr(config, name)!r}"
    saves_bases = adapter_name in model.base_model.randlora_A.saved()
    if not (saves_bases and any(key.endswith(BASIS_NAMES) for key in saved)):
        yield from other_bases(vars(config), fields)
    # What a file may lack, or bring.
    free = BASIS_NAMES
    for key in own:
        if key in saved:
            check = misfit_of_scale if key.endswith(INPUT_SCALE) else misfit
            yield check(key, saved[key], own[key])
        elif not key.endswith(free):
            yield f"{key} is missing"
    # PEFT saves the base weights of a targeted lm_head, too.
    is_base = lambda key: ".base_layer." in key and ".randlora_" not in key  # noqa: E731
    passed = (key for key in saved if not key.endswith(free) and not is_base(key))
    yield from (f"{key} is not part of the adapter" for key in passed if key not in own)


def check_load_over(model: PeftModel, folder: str, adapter_name: str, hub: dict) -> None:
    """ValueError if tensors that ``PeftModel.load_adapter`` writes into an adapter belong to other
    bases, and do not bring these; a warning if alpha differs.
    """
    saved = _SavedFields.from_pretrained(folder, **hub)
    config = model.peft_config[adapter_name]
    saves_bases = adapter_name in model.base_model.randlora_A.saved()
    if not (saves_bases and saved["save_projection"]):
        errors = other_bases(vars(config), saved)
        refuse(errors, f"the adapter of {folder!r}", repr(adapter_name))
    if saved["randlora_alpha"] != config.randlora_alpha:
        warnings.warn(
            f"randlora_alpha of {folder!r} is {saved['randlora_alpha']}, adapter "
            f"{adapter_name!r} keeps its own, {config.randlora_alpha}, as in stock PEFT; "
            "randlora_ext.peft.hotswap_adapter takes over the file's",
            stacklevel=4,
        )


def warn_of_misfits(folder: str, adapter_name: str, result: Any) -> None:
    """Warns if a file has fitted only in part; PEFT returns the keys as `result`, and few look."""
    for keys, told in (
        (result.unexpected_keys, "of its tensors have no place in the model and are not used"),
        (result.missing_keys, "tensors of the adapter are not in it and stay as they were"),
    ):
        if ours := [key for key in keys if any(f".{name}" in key for name in DIAGONALS)]:
            warnings.warn(
                f"the file of {folder!r} fits adapter {adapter_name!r} only in part: "
                f"{len(ours)} {told}: {first(ours)}",
                stacklevel=4,
            )


class _SavedFields(peft.PeftConfig):
    """Its `from_pretrained` gives the fields in a saved adapter_config.json, and PEFT's defaults.

    Not an object: without `enable`, PEFT would make its own, which lacks ``density``.
    """

    @classmethod
    def from_peft_type(cls, **fields):
        return {each.name: each.default for each in dataclass_fields(peft.RandLoraConfig)} | fields
