"""`hotswap_adapter`: another file in the same parameters, refused before anything changes."""

import json
import os
from collections.abc import Iterator
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from peft.utils import CONFIG_NAME
from peft.utils.save_and_load import load_peft_weights

from ..checks import check_alpha
from ..nn.adapter_config import PEFT_TYPES
from ..nn.adapter_record import FIELDS, RECORD_KEY, check_records, record_of
from ..nn.state_dict import INPUT_SCALE, misfit, misfit_of_scale, missing_scale, refuse
from .bases import BASIS_NAMES
from .config import other_bases
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
    place = os.fspath(model_name_or_path)
    fields = _read_fields(place, **kwargs)
    saved = load_peft_weights(place, device=torch_device or "cpu", **kwargs)
    alpha, config = fields["randlora_alpha"], model.peft_config[adapter_name]
    check_alpha("randlora_alpha", alpha)
    if isinstance(fields["projection_prng_key"], str):
        own: dict[str, Any] = {name: fields.get(name) for name in FIELDS}
        record = record_of(**own)
        check_records(saved, record, place)
    errors = _hotswap_errors(model, adapter_name, fields, saved)
    refuse(errors, f"the adapter of {place!r}", repr(adapter_name))
    old, config.randlora_alpha = config.randlora_alpha, alpha  # what the file's records have
    try:
        peft.set_peft_model_state_dict(model, saved, adapter_name=adapter_name)
    except BaseException:
        config.randlora_alpha = old
        raise
    for layer in layers:
        layer.scaling[adapter_name] = alpha / config.r


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
    free = *BASIS_NAMES, RECORD_KEY
    for key in own:
        if key.endswith(RECORD_KEY):
            continue
        if key in saved:
            check = misfit_of_scale if key.endswith(INPUT_SCALE) else misfit
            yield check(key, saved[key], own[key])
        elif key.endswith(INPUT_SCALE):
            yield missing_scale(key)
        elif not key.endswith(free):
            yield f"{key} is missing"
    # PEFT saves the base weights of a targeted lm_head, too.
    is_base = lambda key: ".base_layer." in key and ".randlora_" not in key  # noqa: E731
    passed = (key for key in saved if not key.endswith(free) and not is_base(key))
    yield from (f"{key} is not part of the adapter" for key in passed if key not in own)


def _read_fields(folder: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> dict:
    """The fields in a saved adapter_config.json, and PEFT's defaults of others.

    Not an object: without `enable`, PEFT would make its own, which lacks ``density``.
    """
    file = Path(folder, subfolder or "", CONFIG_NAME)
    if not file.is_file():
        try:
            file = Path(hf_hub_download(os.fspath(folder), CONFIG_NAME, subfolder=subfolder, **hub))
        except (OSError, ValueError) as error:
            raise ValueError(f"{os.fspath(folder)!r} holds no {CONFIG_NAME}: {error}") from error
    defaults = {each.name: each.default for each in dataclass_fields(peft.RandLoraConfig)}
    return defaults | json.loads(file.read_text())
