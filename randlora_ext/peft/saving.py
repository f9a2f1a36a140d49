"""Saving: files that are complete when they appear, for stock PEFT too, and their model cards."""

import copy
import dataclasses
import functools
import inspect
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch.nn.functional as F
from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME
from torch import Tensor

from ..basis import TernaryBasis
from ..nn.state_dict import INPUT_SCALE
from ..writing import appear_together
from .bases import BASIS_NAMES, largest
from .basis_tensor import BasisTensor
from .config import NEEDS_OURS, description_of, record_configurations
from .layer import layers_with

_BEGIN, _END = "<!-- opens with -->", "<!-- end of opens with -->"  # our part of a card
_OPENS = f"""{_BEGIN}
Only `randlora-ext`, a package for Hugging Face PEFT, opens this RandLoRA adapter:

```python
import peft
import randlora_ext.peft

randlora_ext.peft.enable()
model = peft.PeftModel.from_pretrained(base, {{place}})  # base: the model it was trained on
```
{_END}

"""


def save_together(stock: Callable, model: peft.PeftModel, save_directory, *args, **kwargs) -> None:
    """Has PeftModel's ``save_pretrained`` write into a scratch folder first, and adds our card."""
    call = inspect.signature(stock).bind(model, save_directory, *args, **kwargs)
    call.apply_defaults()
    if not call.arguments["is_main_process"] or os.path.isfile(save_directory):  # PEFT's own error
        stock(model, save_directory, *args, **kwargs)
        return
    with appear_together(save_directory) as folder:
        copy_card(save_directory, folder)
        stock(model, str(folder), *args, **kwargs)
        write_card(folder, Path(save_directory).absolute().name)
        record_configurations(folder)


def export_to_peft(model: peft.PeftModel, folder: str | os.PathLike) -> None:
    """Writes what stock PEFT opens with the same numbers, whatever the bases are.

    Equivalent to ``model.save_pretrained(folder)`` of a stock model with ``save_projection=True``
    whose bases are these, dense, by a configuration with PEFT's fields alone. Each adapter is
    written as by PEFT: "default" into the folder, others into folders of their name. Old files stay
    until the new ones are complete. PEFT up to 0.21.2 warns of "missing adapter keys", the copies
    that its own files hold for every layer, but loads these files correctly.

    Raises TypeError if model is no PeftModel over RandLoRA layers; ValueError if Hadamard bases
    belong to layers of different min(in, out), since stock PEFT shares one A and one B among all
    layers, or to a calibrated layer with more inputs than outputs, which it names.
    """
    layers_with(model)
    with appear_together(folder) as scratch:
        copy_card(folder, scratch)
        _save_adapters(model, scratch)


def _save_adapters(model: peft.PeftModel, folder: Path) -> None:
    configs, stock = dict(model.peft_config), {}
    copies = tuple(f".{bases}." for bases in BASIS_NAMES)
    state = {k: v for k, v in model.state_dict().items() if not any(part in k for part in copies)}
    for name, config in configs.items():
        layers = {
            path: (layer.in_features, layer.out_features)
            for path, layer in layers_with(model, name).items()
        }
        _fold_scales(state, name, layers_with(model, name))
        A, B = (getattr(model.base_model, bases)[name] for bases in BASIS_NAMES)
        stock[name] = stock_config(config, isinstance(A, BasisTensor))
        for bases, dense in zip(BASIS_NAMES, dense_bases(config, A, B, layers), strict=True):
            state[f"base_model.{bases}.{name}"] = dense.detach()
    try:
        model.peft_config.update(stock)
        model.save_pretrained(str(folder), state_dict=state)
    finally:
        model.peft_config.update(configs)


def _fold_scales(state: dict[str, Tensor], name: str, layers: Mapping[str, Any]) -> None:
    """Multiplies input scales into the gammas of `state`, and takes them out of it."""
    for path, layer in layers.items():
        scale = getattr(layer, "input_scales", {}).get(name)
        if scale is None:
            continue
        if layer.in_features > layer.out_features:
            raise ValueError(
                f"layer {path!r} is calibrated and has more inputs ({layer.in_features}) than "
                f"outputs ({layer.out_features}): its input scale belongs to B, which stock PEFT "
                "shares among all layers; merge instead (merge_and_unload or `randlora merge`)"
            )
        key = f"base_model.model.{path}"
        del state[f"{key}.{INPUT_SCALE}.{name}"]
        gamma = f"{key}.randlora_gamma.{name}"
        state[gamma] = state[gamma] * scale.to(state[gamma])


def dense_bases(
    config: peft.RandLoraConfig, A: Tensor, B: Tensor, layers: Mapping[str, tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """A (r, 1, d) and B (D, n, r), dense, from which stock PEFT slices the bases of all layers.

    Args:
        layers: (in_features, out_features) by name. Of generated bases, those of a smaller layer
            are parts of those of a larger one, with one exception: A of Hadamard bases depends on
            min(in, out), which decides the classes.

    Raises ValueError, naming two layers, if Hadamard bases belong to layers whose min(in, out)
    differ.
    """
    description = description_of(vars(config))
    if description is None:
        A, B = (t.dense() if isinstance(t, BasisTensor) else t for t in (A, B))
        return A, B
    (first, sizes), *others = layers.items()
    for other, its in others:
        if description.kind == "hadamard" and min(its) != min(sizes):
            raise ValueError(
                "stock PEFT has one pair of bases for all layers, and A of Hadamard bases depends "
                f"on min(in, out): layer {first!r} has {sizes[0]} -> {sizes[1]} features, layer "
                f"{other!r} {its[0]} -> {its[1]}; merge instead (merge_and_unload or `randlora "
                "merge`)"
            )
    (D, d), r = largest(layers.values()), config.r
    own_d = min(sizes) if description.kind == "hadamard" else d
    made = description.density, description.seed, description.kind
    A, B = TernaryBasis(own_d, D, r, *made).dense()
    A, B = F.pad(A, (0, d - own_d)), F.pad(B, (0, -(-d // r) * r - B.shape[1]))
    return A.unsqueeze(1), B.unflatten(1, (-1, r))


def stock_config(config: peft.RandLoraConfig, packed: bool) -> peft.RandLoraConfig:
    """PEFT's own configuration with the fields that it knows.

    Args:
        packed: whether the bases are ternary.
    """
    values = {
        field.name: copy.deepcopy(getattr(config, field.name))
        for field in dataclasses.fields(peft.RandLoraConfig)
        if field.init
    }
    if (description := description_of(vars(config))) is not None:
        values["projection_prng_key"] = description.seed
    values["save_projection"] = True
    # Stock PEFT draws bases before it loads these over them. It keeps uniform ones in bfloat16,
    # which would round the value, and sparse ones in float32.
    values["sparse"] = packed and not config.very_sparse
    return peft.RandLoraConfig(**values)


def refuse_lora_files(model: Any) -> None:
    """Has a model of diffusers refuse `save_lora_adapter` of RandLoRA, whose file nothing opens."""
    if hasattr(model, "save_lora_adapter"):
        model.save_lora_adapter = functools.partial(_save_lora_adapter, model)


def _save_lora_adapter(
    model: Any, save_directory, adapter_name: str = "default", *args, **kwargs
) -> None:
    if isinstance(model.peft_config.get(adapter_name), peft.RandLoraConfig):
        raise ValueError(
            f"adapter_name={adapter_name!r} is RandLoRA, and nothing opens a file of "
            "save_lora_adapter with it; save peft.get_peft_model_state_dict(model), or the nearest "
            "LoRA by peft.save_as_lora(folder, model, rank=...)"
        )
    type(model).save_lora_adapter(model, save_directory, adapter_name, *args, **kwargs)


# ---- model cards ---------------------------------------------------------------------------------


def copy_card(folder: str | os.PathLike, scratch: Path) -> None:
    """Copies the model card, because PEFT updates an existing card and keeps its text."""
    if (card := Path(folder, "README.md")).exists():
        shutil.copy(card, scratch)


def write_card(folder: Path, name: str) -> None:
    """Begins PEFT's README.md in `folder` with how to open the adapter, if PEFT alone cannot.

    Args:
        folder: holds saved adapters; the text opens the first one.
        name: what the text calls the folder.
    """
    file = folder / "README.md"
    configs = sorted(folder.rglob(CONFIG_NAME), key=lambda path: (len(path.parts), path))
    if not configs or not file.exists():
        return
    card = ModelCard.load(file)
    before, _, rest = card.text.partition(_BEGIN)
    text = (before + rest.partition(_END)[2]).strip("\n")
    if json.loads(configs[0].read_text())["peft_type"] == NEEDS_OURS:
        at = configs[0].parent.relative_to(folder).as_posix()
        place = repr(name) if at == "." else f"{name!r}, subfolder={at!r}"
        text = _OPENS.format(place=place) + text
    card.text = text + "\n"
    card.save(file)
