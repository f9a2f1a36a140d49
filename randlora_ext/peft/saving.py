"""Saving: files that are complete when they appear, for stock PEFT too, and their model cards."""

import copy
import dataclasses
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData
from peft.utils import CONFIG_NAME
from safetensors.torch import save_model
from torch import Tensor

from ..basis import TernaryBasis
from ..writing import SCRATCH, appear_together
from .adapter_basis import BASIS_NAMES, AdapterBasis, largest, make_bases
from .config import record_configurations
from .layer import layers_with, refuse_sharded
from .ternary_tensor import TernaryTensor

_BEGIN, _END = "<!-- opens with -->", "<!-- end of opens with -->"  # our part of a card
_OURS = re.compile(f"{_BEGIN}.*?{_END}", re.DOTALL)
# What the hub's template has at that place.
_EMPTY = "Use the code below to get started with the model.\n\n[More Information Needed]"
_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


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
        place = Path(save_directory).absolute()  # or a scratch folder in it
        place = place.parent if place.name.startswith(SCRATCH) else place
        write_card(folder, place.name, model)
        record_configurations(folder)


def export_to_peft(model: peft.PeftModel, folder: str | os.PathLike, merged: bool = False) -> None:
    """Writes what stock PEFT opens with the same numbers, whatever the bases are.

    Equivalent to ``model.save_pretrained(folder)`` of a stock model with ``save_projection=True``
    whose bases are these: generated ones and those of any density are written dense, and the
    configuration has PEFT's fields only. Old files stay until the new ones are complete. Stock
    PEFT shares one A and one B among all layers, so Hadamard bases can only be written for layers
    of one min(in, out). PEFT up to 0.21.2 warns of "missing adapter keys", the copies
    that its own files hold for every layer, but loads these files correctly.

    Args:
        model: a PeftModel. Each adapter is written as by PEFT: "default" into the folder, others
            into folders of their name.
        merged: write the base model with the active adapters merged into its weights instead, by
            ``save_pretrained`` of the base model, or as model.safetensors if it has none. A copy
            is merged. 16-bit weights round the sum to 16 bits; ``model.float()`` first avoids it.

    Raises TypeError if model is no PeftModel over RandLoRA layers, ValueError if Hadamard
    bases belong to layers of different min(in, out), which it names.
    """
    layers_with(model)
    if merged:
        refuse_sharded(model)
    with appear_together(folder) as scratch:
        if not merged:
            copy_card(folder, scratch)
            _save_adapters(model, scratch)
            return
        plain = copy.deepcopy(model).merge_and_unload(safe_merge=True)
        if hasattr(plain, "save_pretrained"):
            plain.save_pretrained(scratch)
        else:
            save_model(plain, str(scratch / "model.safetensors"))


def _save_adapters(model: peft.PeftModel, folder: Path) -> None:
    configs, stock = dict(model.peft_config), {}
    copies = tuple(f".{bases}." for bases in BASIS_NAMES)
    state = {k: v for k, v in model.state_dict().items() if not any(part in k for part in copies)}
    for name, config in configs.items():
        layers = {
            path: (layer.in_features, layer.out_features)
            for path, layer in layers_with(model, name).items()
        }
        A, B = (getattr(model.base_model, bases)[name] for bases in BASIS_NAMES)
        if AdapterBasis.of(vars(config)).kind != "peft":
            # Another adapter's may be larger, and PEFT's casts do not round generated ones.
            A, B = make_bases(config, *largest(layers.values()))
        stock[name] = stock_config(config, isinstance(A, TernaryTensor))
        for bases, dense in zip(BASIS_NAMES, dense_bases(A, B, layers), strict=True):
            state[f"base_model.{bases}.{name}"] = dense.detach()
    try:
        model.peft_config.update(stock)
        model.save_pretrained(str(folder), state_dict=state)
    finally:
        model.peft_config.update(configs)


def dense_bases(
    A: Tensor, B: Tensor, layers: Mapping[str, tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """A (r, 1, d) and B (D, n, r), dense, from which stock PEFT slices the bases of all layers.

    Args:
        layers: (in_features, out_features) by name. Of Hadamard bases, B of a smaller layer is a
            part of that of a larger one; A is so only if min(in, out) is equal, since it decides
            the classes.

    Raises ValueError, naming two layers, if Hadamard bases belong to layers whose min(in, out)
    differ.
    """
    if not (isinstance(A, TernaryTensor) and A.is_hadamard):
        A, B = (t.dense() if isinstance(t, TernaryTensor) else t for t in (A, B))
        return A, B
    (first, sizes), *others = layers.items()
    for other, its in others:
        if min(its) != min(sizes):
            raise ValueError(
                "stock PEFT has one pair of bases for all layers, and A of Hadamard bases depends "
                f"on min(in, out): layer {first!r} has {sizes[0]} -> {sizes[1]} features, layer "
                f"{other!r} {its[0]} -> {its[1]}; merge instead (export_to_peft(..., merged=True) "
                "or `randlora merge`)"
            )
    assert A.signs.description is not None
    (r, _, d), (D, n, _), small = A.shape, B.shape, min(sizes)
    A, B = TernaryBasis(small, D, r, None, A.signs.description.seed, "hadamard").dense()
    A, B = F.pad(A, (0, d - small)), F.pad(B, (0, n * r - B.shape[1]))
    return A.unsqueeze(1), B.unflatten(1, (n, r))


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
    values["projection_prng_key"] = AdapterBasis.of(vars(config)).seed
    values["save_projection"] = True
    # Stock PEFT draws bases before it loads these over them. It keeps uniform ones in bfloat16,
    # which would round the value, and sparse ones in float32.
    values["sparse"] = packed and not config.very_sparse
    return peft.RandLoraConfig(**values)


# ---- model cards: which package opens an adapter, and a snippet that does --------------------


def write_card(
    folder: Path, name: str, model: peft.PeftModel | None = None, note: str = ""
) -> None:
    """Writes our part of README.md in `folder`, which holds saved adapters, and its metadata.

    The card keeps what others have written; tags, base model and library are PEFT's.

    Args:
        name: what the snippet loads: the folder's name, or a repository.
        model: what was saved; None knows only the configuration's ``task_type``.
        note: another sentence.
    """
    configs = sorted(folder.rglob(CONFIG_NAME), key=lambda path: (len(path.parts), path))
    if not configs:
        return
    fields = json.loads(configs[0].read_text())
    subfolder = configs[0].parent.relative_to(folder).as_posix()
    file = folder / "README.md"
    card = ModelCard.load(file) if file.exists() else ModelCard.from_template(ModelCardData())
    loads = _AUTO.get(fields.get("task_type") or "", ""), ""
    if model is not None:
        loads = _loader_of(model.get_base_model())
    _write_metadata(card.data, fields, loads[0])
    ours = _section(fields, name, "" if subfolder == "." else subfolder, *loads, note)
    if _OURS.search(card.text):
        card.text = _OURS.sub(lambda _: ours, card.text)
    elif _EMPTY in card.text:
        card.text = card.text.replace(_EMPTY, ours)
    else:
        card.text = f"{card.text.rstrip()}\n\n{ours}\n"
    card.save(file)


def _loader_of(base: Any) -> tuple[str, str]:
    """The class of transformers whose ``from_pretrained`` loads `base`, or "", and arguments."""
    import transformers

    name = type(base).__name__
    if not isinstance(base, transformers.PreTrainedModel) or not hasattr(transformers, name):
        return "", ""
    # A base model's files do not know how many outputs a classifier has.
    classifies = name.endswith("Classification")
    return name, f", num_labels={base.config.num_labels}" if classifies else ""


def copy_card(folder: str | os.PathLike, scratch: Path) -> None:
    """Copies the model card, because PEFT updates an existing card and keeps its text."""
    if (card := Path(folder, "README.md")).exists():
        shutil.copy(card, scratch)


def _write_metadata(data: Any, fields: dict, loader: str) -> None:
    tags = set(data.tags or [])
    data.library_name = "peft"
    if fields["peft_type"] == "LORA":
        tags.add("lora")
    if loader:
        tags.add("transformers")
    if path := fields.get("base_model_name_or_path"):
        data.base_model = data.base_model or path
        tags.add(f"base_model:adapter:{path}")
    if fields.get("task_type") == "CAUSAL_LM":
        data.pipeline_tag = data.pipeline_tag or "text-generation"
    data.tags = sorted(tags)


def _section(
    fields: dict, name: str, subfolder: str, loader: str, arguments: str, note: str
) -> str:
    needs_ours = isinstance(fields.get("projection_prng_key"), str)
    if fields["peft_type"] == "LORA":
        told = "This is a LoRA adapter of Hugging Face PEFT."
    elif needs_ours:
        told = (
            "This is a RandLoRA adapter that holds its bases as a seed. Only `randlora-ext` opens "
            "it, a package for Hugging Face PEFT."
        )
    else:
        told = (
            "This is a RandLoRA adapter of Hugging Face PEFT. With `randlora-ext` it runs on "
            "compiled kernels: `import randlora_ext.peft` and `randlora_ext.peft.enable()` first."
        )
    lines = ["import peft"]
    if needs_ours:
        lines += ["import randlora_ext.peft"]
    path = fields.get("base_model_name_or_path")
    if loader and path:
        load = [f"base = {loader}.from_pretrained({path!r}{arguments})"]
        lines += [f"from transformers import {loader}"]
    else:
        load = ["base = ...  # the model that the adapter was trained on"]
    lines += ["", *(["randlora_ext.peft.enable()"] if needs_ours else []), *load]
    inside = f", subfolder={subfolder!r}" if subfolder else ""
    lines += [f"model = peft.PeftModel.from_pretrained(base, {name!r}{inside})"]
    packages = "randlora-ext[peft]" if needs_ours else "peft"
    text = f"{told} {note}".strip()
    return "\n".join(
        [_BEGIN, text, "", "```bash", f'pip install "{packages}"', "```", "", "```python", *lines]
        + ["```", _END]
    )
