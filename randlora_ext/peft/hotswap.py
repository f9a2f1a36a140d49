"""`hotswap_adapter`: another file in the same parameters, refused before anything changes."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import hf_hub_download
from peft import PeftModel
from torch import Tensor

from ..basis import BasisDescription
from ..nn.adapter_config import SPARSE
from ..nn.adapter_record import RECORD_KEY
from ..nn.saved_adapter import CONFIG, WEIGHTS, SavedAdapter, read_adapter
from ..nn.state_dict import INPUT_SCALE, input_scale_misfits, refuse, tensor_misfits
from .bases import BASIS_NAMES
from .config import description_of_config, target_parameters
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
    ``model.load_adapter(folder, adapter_name)`` also writes into the parameters, but the adapter
    keeps its own scaling, and a file may lack tensors.

    Args:
        model: a PeftModel on our layers.
        model_name_or_path: a folder or repository with an adapter; kwargs as PEFT's
            ``load_adapter`` takes them (subfolder, revision, token).
        torch_device: where the file is read to; default the CPU.

    Raises, and leaves the model as it was: TypeError for another model; RuntimeError if the adapter
    is merged; OSError if a file cannot be read; ValueError if the adapter is not there, if the
    saved one is damaged or no RandLoRA adapter, or, naming the first ten, if it has another r or
    dropout, other tensors or shapes, or brings no bases and belongs to other ones.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, AcceleratedRandLoraModel):
        raise TypeError(
            f"hotswap_adapter needs a PeftModel on randlora_ext's layers, got {type(model)}; see "
            "enable() and accelerate()"
        )
    layers = layers_with(model, adapter_name).values()
    saved = read_adapter(_folder_of(os.fspath(model_name_or_path), **kwargs))
    errors = _hotswap_errors(model, adapter_name, saved)
    refuse(errors, f"the adapter of {saved.place!r}", repr(adapter_name))
    tensors = {key: tensor.to(torch_device or "cpu") for key, tensor in saved.tensors.items()}
    config = model.peft_config[adapter_name]
    old_alpha = config.randlora_alpha
    config.randlora_alpha = saved.randlora_alpha  # as in the records of the file
    try:
        peft.set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
    except BaseException:
        config.randlora_alpha = old_alpha
        raise
    for layer in layers:
        layer.scaling[adapter_name] = saved.scaling


def _hotswap_errors(model: PeftModel, adapter_name: str, saved: SavedAdapter) -> Iterator[str]:
    """Why the saved adapter cannot take the place of the model's."""
    config = model.peft_config[adapter_name]
    for name in ("r", "randlora_dropout"):
        if saved.fields[name] != getattr(config, name):
            yield f"{name} is {saved.fields[name]!r}, not {getattr(config, name)!r}"
    saves_bases = adapter_name in model.base_model.randlora_A.saved()
    if not (saves_bases and any(key.endswith(BASIS_NAMES) for key in saved.tensors)):
        yield from _other_bases(config, saved)
    own = peft.get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=False
    )
    yield from _other_tensors(own, saved.tensors)


def _other_bases(config: peft.RandLoraConfig, saved: SavedAdapter) -> Iterator[str]:
    own_bases = _bases_in_words(description_of_config(config), vars(config))
    saved_bases = _bases_in_words(saved.basis, saved.fields)
    if saved_bases != own_bases:
        yield f"its bases are {saved_bases}, not {own_bases}"
    # Files do not name these parameters: their layers are told apart by order.
    own_targets, saved_targets = target_parameters(config), sorted(saved.targets)
    if saved_targets != own_targets:
        yield f"its target_parameters are {saved_targets}, not {own_targets}"


def _other_tensors(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> Iterator[str]:
    may_lack = *BASIS_NAMES, RECORD_KEY
    for key, tensor in own.items():
        if key.endswith(RECORD_KEY):
            continue
        if key in saved:
            is_input_scale = key.endswith(INPUT_SCALE)
            misfits = input_scale_misfits if is_input_scale else tensor_misfits
            yield from misfits(key, saved[key], tensor)
        elif not key.endswith(may_lack):
            yield f"{key} is missing"
    for key in saved:
        # PEFT saves the base weights of a targeted lm_head, too.
        of_base = ".base_layer." in key and ".randlora_" not in key
        if key not in own and not key.endswith(may_lack) and not of_base:
            yield f"{key} is not part of the adapter"


def _bases_in_words(description: BasisDescription | None, fields: Mapping[str, Any]) -> str:
    if description is not None:
        return description.key()
    # very_sparse overrules the other flag
    flag = next((name for name in reversed(SPARSE) if fields.get(name)), "uniform")
    return f"PEFT's, {flag}, of projection_prng_key={fields['projection_prng_key']}"


def _folder_of(folder: str, subfolder: str | None = None, **hub: Any) -> Path:
    """The local folder, or the one into which the hub's files are downloaded."""
    if os.path.exists(folder):
        return Path(folder, subfolder or "")
    try:
        config = hf_hub_download(folder, CONFIG, subfolder=subfolder, **hub)
        hf_hub_download(folder, WEIGHTS, subfolder=subfolder, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder!r} is no folder here, and not on the hub: {error}") from error
    return Path(config).parent
