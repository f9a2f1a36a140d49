"""Putting another adapter's numbers in the place of one that is loaded."""

import os

import peft
import torch
from peft import PeftType
from peft.tuners.randlora.layer import RandLoraLayer
from peft.utils.save_and_load import load_peft_weights

from .bases import BASES, misfit
from .checkpoint import bases_misfits, saved_fields
from .model import AcceleratedRandLoraModel


def hotswap_adapter(
    model: peft.PeftModel,
    model_name_or_path: str | os.PathLike,
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs,
) -> None:
    """Overwrites adapter `adapter_name` by a saved one, in the same parameters.

    Equivalent to ``peft.utils.hotswap.hotswap_adapter``, which knows LoRA alone: no parameter is
    made anew, so optimizers go on; the scaling becomes the file's.
    ``model.load_adapter(folder, adapter_name)`` also writes into them, but keeps the adapter's own
    scaling, and takes a file in which tensors are missing.

    Args:
        model: a PeftModel on our layers.
        model_name_or_path: where ``save_pretrained`` wrote an adapter; kwargs as PEFT's
            ``load_adapter`` takes them (subfolder, revision, token).
        torch_device: where the file is read to; default the CPU.

    Raises, and leaves the model as it was: TypeError for another model; ValueError where the
    adapter is not there or merged, or, naming each thing, where the file has another type, r or
    dropout, other tensors or shapes, or brings no bases and was made from other ones (key, basis,
    density, sparse, very_sparse).
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, AcceleratedRandLoraModel):
        raise TypeError(
            f"hotswap_adapter needs a PeftModel on randlora_ext's layers, got {type(model)}; see "
            "enable() and accelerate()"
        )
    if adapter_name not in model.peft_config:
        raise ValueError(
            f"adapter_name must be one of {list(model.peft_config)}, got {adapter_name!r}"
        )
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, RandLoraLayer) and adapter_name in layer.randlora_lambda
    ]
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(
            f"adapter {adapter_name!r} is merged into the weights; call unmerge_adapter() first"
        )
    fields = saved_fields(model_name_or_path, **kwargs)
    saved = load_peft_weights(model_name_or_path, device=torch_device or "cpu", **kwargs)
    errors = _misfits(model, adapter_name, fields, saved)
    if errors:
        raise ValueError(
            f"the adapter of {str(model_name_or_path)!r} does not fit {adapter_name!r}, which is "
            "unchanged:\n\t" + "\n\t".join(errors)
        )
    peft.set_peft_model_state_dict(model, saved, adapter_name=adapter_name)
    for layer in layers:
        layer.scaling[adapter_name] = fields["randlora_alpha"] / fields["r"]
    model.peft_config[adapter_name].randlora_alpha = fields["randlora_alpha"]


def _misfits(
    model: peft.PeftModel,
    adapter_name: str,
    fields: dict,
    saved: dict[str, torch.Tensor],
) -> list[str]:
    if fields["peft_type"] != PeftType.RANDLORA:
        return [f"peft_type is {fields['peft_type']}, not {PeftType.RANDLORA.value}"]
    # Before 0.20 PEFT would return what the other adapters have as well.
    others = tuple(f".{name}" for name in model.peft_config if name != adapter_name)
    state = {
        k: v for k, v in model.state_dict().items() if not ("randlora_" in k and k.endswith(others))
    }
    own = peft.get_peft_model_state_dict(
        model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False
    )
    persistent = model.base_model.randlora_A.persistent
    brings_bases = persistent and any(key.endswith(BASES) for key in saved)
    config = model.peft_config[adapter_name]
    errors = [
        f"{name} is {fields[name]!r}, not {getattr(config, name)!r}"
        for name in ("r", "randlora_dropout")
        if fields[name] != getattr(config, name)
    ]
    errors += [] if brings_bases else bases_misfits(config, fields)
    missing = [key for key in own if key not in saved and not key.endswith(BASES)]
    unexpected = [key for key in saved if key not in own and not key.endswith(BASES)]
    errors += [f"{key} is missing" for key in missing]
    errors += [f"{key} is not part of the adapter" for key in unexpected]
    errors += [e for key in own if key in saved and (e := misfit(key, saved[key], own[key]))]
    return errors
