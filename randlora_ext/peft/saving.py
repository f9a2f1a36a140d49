"""Saving: files that are complete when they appear, for stock PEFT too, and their model cards."""

import functools
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import torch.nn.functional as F
from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME
from torch import Tensor

from ..basis import Basis
from ..files import appear_together
from ..nn.adapter_config import NEEDS_OURS
from ..nn.state_dict import INPUT_SCALE
from .bases import PackedBasis, dense_of, largest
from .config import description_of_config
from .layer import layers_with

_MERGE = "merge instead (merge_and_unload or `randlora merge`)"
_OPENS = """Only `randlora-ext`, a package for Hugging Face PEFT, opens this RandLoRA adapter:

```python
import peft
import randlora_ext.peft

randlora_ext.peft.enable()
model = peft.PeftModel.from_pretrained(base, folder)  # base: the model it was trained on
```

"""
_IS_CALIBRATED = re.compile(r"^Calibrated by `randlora_ext.calibrate`: .*\n\n", re.M)


def save_together(stock: Callable, model: peft.PeftModel, save_directory, *args, **kwargs) -> None:
    """Has `stock`, PeftModel's ``save_pretrained``, write into a scratch folder; the README.md
    begins with how to open the adapter, if PEFT alone cannot."""
    if not kwargs.get("is_main_process", True):
        stock(model, save_directory, *args, **kwargs)
        return
    with appear_together(save_directory) as folder:
        old_card = Path(save_directory, "README.md")
        if old_card.exists():
            shutil.copy(old_card, folder)  # PEFT updates it and keeps its text
        stock(model, str(folder), *args, **kwargs)
        if (folder / "README.md").exists():
            _complete_card(folder, model)


def _complete_card(folder: Path, model: peft.PeftModel) -> None:
    """Says in README.md how to open the adapters, if PEFT alone cannot."""
    card = ModelCard.load(folder / "README.md")
    text = _IS_CALIBRATED.sub("", card.text.replace(_OPENS, "")).lstrip("\n")
    configs = sorted(folder.rglob(CONFIG_NAME))
    if any(NEEDS_OURS in config.read_text() for config in configs):
        places = [config.parent for config in configs]
        names = ["default" if place == folder else place.name for place in places]
        text = _OPENS + _calibration(model, names) + text
    card.text = text
    card.save(folder / "README.md")


def _calibration(model: peft.PeftModel, names: list[str]) -> str:
    """Of adapters on Hadamard bases a line that `_IS_CALIBRATED` finds again."""
    answers = {}
    for name in names:
        layers = [layer for layer in layers_with(model, name).values() if _on_hadamard(layer, name)]
        if layers:
            is_calibrated = any(layer.is_calibrated(name) for layer in layers)
            answers[name] = "yes" if is_calibrated else "no"
    if not answers:
        return ""
    if len(names) == 1:
        listed = answers[names[0]]
    else:
        listed = ", ".join(f"{name} {answer}" for name, answer in answers.items())
    return f"Calibrated by `randlora_ext.calibrate`: {listed}.\n\n"


def _on_hadamard(layer: Any, name: str) -> bool:
    """Whether the adapter has an input scale there. Stock PEFT's layers have none."""
    return name in getattr(layer, "randlora_input_scale", ())


def export_to_peft(model: peft.PeftModel, folder: str | os.PathLike) -> None:
    """Writes what stock PEFT opens with the same numbers, whatever the bases are.

    Equivalent to ``model.save_pretrained(folder)`` of a stock model with ``save_projection=True``
    whose bases are these, dense, by a configuration with PEFT's fields alone.

    Raises TypeError if model is no PeftModel over RandLoRA layers; ValueError if Hadamard bases
    belong to layers of different min(in, out), since stock PEFT shares one A and one B among all
    layers, or to a calibrated layer with more inputs than outputs, which it names, or if an adapter
    has target_parameters.
    """
    layers_with(model)
    configs, stock = dict(model.peft_config), {}
    if any(getattr(config, "target_parameters", None) for config in configs.values()):
        raise ValueError(f"model has target_parameters, which stock PEFT lacks; {_MERGE}")
    state = model.state_dict()
    for name, config in configs.items():
        layers = layers_with(model, name)
        _fold_input_scales(state, name, layers)
        A, B = model.base_model.randlora_A[name], model.base_model.randlora_B[name]
        stock[name] = _stock_config(config, isinstance(A, PackedBasis))
        A, B = _dense_bases(config, A, B, layers)
        state[f"base_model.randlora_A.{name}"] = A.detach()
        state[f"base_model.randlora_B.{name}"] = B.detach()
    try:
        model.peft_config.update(stock)
        model.save_pretrained(os.fspath(folder), state_dict=state)
    finally:
        model.peft_config.update(configs)


def _fold_input_scales(state: dict[str, Tensor], name: str, layers: Mapping[str, Any]) -> None:
    """Multiplies input scales into the gammas of `state`, and takes them out of it."""
    for path, layer in layers.items():
        if not _on_hadamard(layer, name):
            continue
        if layer.is_calibrated(name) and layer.in_features > layer.out_features:
            raise ValueError(
                f"layer {path!r} is calibrated and has more inputs ({layer.in_features}) than "
                f"outputs ({layer.out_features}): stock PEFT shares B among all layers; {_MERGE}"
            )
        key = f"base_model.model.{path}"
        del state[f"{key}.{INPUT_SCALE}.{name}"]
        gamma = f"{key}.randlora_gamma.{name}"
        if layer.is_calibrated(name):
            input_scale = layer.randlora_input_scale[name]
            state[gamma] = state[gamma] * input_scale.to(state[gamma])


def _dense_bases(
    config: peft.RandLoraConfig, A: Tensor, B: Tensor, layers: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """A (r, 1, d) and B (D, n, r), dense, from which stock PEFT slices the bases of all `layers`.

    Of generated bases, those of a smaller layer are parts of those of a larger one, with one
    exception: A of Hadamard bases depends on min(in, out).
    """
    description = description_of_config(config)
    if description is None:
        return dense_of(A), dense_of(B)
    D, d = largest((layer.in_features, layer.out_features) for layer in layers.values())
    r = config.r
    drawn_d = d
    if description.kind == "hadamard":
        layer_with: dict[int, str] = {}  # the first one, by min(in, out)
        for path, layer in layers.items():
            layer_with.setdefault(min(layer.in_features, layer.out_features), path)
        if len(layer_with) > 1:
            raise ValueError(
                "stock PEFT has one pair of bases for all layers, and A of Hadamard bases depends "
                "on min(in, out), which differs (layers by it: "
                f"{dict(sorted(layer_with.items()))}); {_MERGE}"
            )
        drawn_d = next(iter(layer_with))
    A, B = Basis(drawn_d, D, r, **vars(description)).dense()
    # Stock PEFT has a base for every r of the d features.
    A, B = F.pad(A, (0, d - drawn_d)), F.pad(B, (0, -(-d // r) * r - B.shape[1]))
    return A.unsqueeze(1), B.unflatten(1, (-1, r))


def _stock_config(config: peft.RandLoraConfig, packed: bool) -> peft.RandLoraConfig:
    """PEFT's own configuration with the fields that it knows, for bases that are ternary or not."""
    values = {f.name: getattr(config, f.name) for f in fields(peft.RandLoraConfig) if f.init}
    description = description_of_config(config)
    if description is not None:
        values["projection_prng_key"] = description.seed
    # Stock PEFT draws bases before it loads these over them. It keeps uniform ones in bfloat16,
    # which would round the value, and sparse ones in float32.
    sparse = packed and not config.very_sparse
    return peft.RandLoraConfig(**values | {"save_projection": True, "sparse": sparse})


def refuse_lora_files(model: Any) -> None:
    """Has a model of diffusers refuse `save_lora_adapter` of RandLoRA, whose file nothing opens."""
    if hasattr(model, "save_lora_adapter"):
        model.save_lora_adapter = functools.partial(_save_lora_adapter, model)


def _save_lora_adapter(
    model: Any, save_directory, adapter_name: str = "default", *args, **kwargs
) -> None:
    if isinstance(getattr(model, "peft_config", {}).get(adapter_name), peft.RandLoraConfig):
        raise ValueError(
            f"adapter_name={adapter_name!r} is RandLoRA, and nothing opens a file of "
            "save_lora_adapter with it; save peft.get_peft_model_state_dict(model), or the nearest "
            "LoRA by peft.save_as_lora(folder, model, rank=...)"
        )
    type(model).save_lora_adapter(model, save_directory, adapter_name, *args, **kwargs)
