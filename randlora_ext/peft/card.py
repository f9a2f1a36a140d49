"""Model cards: which package opens an adapter, and a snippet that does."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import CONFIG_NAME

from ..writing import SCRATCH

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


class Base(NamedTuple):
    """How the base model is loaded.

    Attributes:
        name: its class in transformers; None if it has none.
        labels: outputs of its classifier, which a base model's files do not know; None without.
    """

    name: str | None = None
    labels: int | None = None

    @classmethod
    def of(cls, model: Any) -> "Base":
        import transformers

        name = type(model).__name__
        if not isinstance(model, transformers.PreTrainedModel) or not hasattr(transformers, name):
            return cls()
        classifies = name.endswith("Classification")
        return cls(name, model.config.num_labels if classifies else None)


def write_card(folder: Path, name: str, base: Base | None = None, note: str = "") -> None:
    """Writes our part of README.md in `folder`, which holds saved adapters, and its metadata.

    The card keeps what others have written; tags, base model and library are PEFT's.

    Args:
        name: what the snippet loads: the folder's name, or a repository.
        base: None knows only the configuration's ``task_type``.
        note: another sentence.
    """
    configs = sorted(folder.rglob(CONFIG_NAME), key=lambda path: (len(path.parts), path))
    if not configs:
        return
    fields = json.loads(configs[0].read_text())
    subfolder = configs[0].parent.relative_to(folder).as_posix()
    file = folder / "README.md"
    card = ModelCard.load(file) if file.exists() else ModelCard.from_template(ModelCardData())
    base = base or Base(_AUTO.get(fields.get("task_type") or ""))
    _write_metadata(card.data, fields, base)
    ours = _section(fields, name, "" if subfolder == "." else subfolder, base, note)
    if _OURS.search(card.text):
        card.text = _OURS.sub(lambda _: ours, card.text)
    elif _EMPTY in card.text:
        card.text = card.text.replace(_EMPTY, ours)
    else:
        card.text = f"{card.text.rstrip()}\n\n{ours}\n"
    card.save(file)


def name_of(folder: str | os.PathLike) -> str:
    """The name of a folder, or of the one that a scratch folder's files will be moved to."""
    place = Path(folder).absolute()
    return (place.parent if place.name.startswith(SCRATCH) else place).name


def copy_card(folder: str | os.PathLike, scratch: Path) -> None:
    """Copies the model card, because PEFT updates an existing card and keeps its text."""
    if (card := Path(folder, "README.md")).exists():
        shutil.copy(card, scratch)


def _write_metadata(data: Any, fields: dict, base: Base) -> None:
    tags = set(data.tags or [])
    data.library_name = "peft"
    if fields["peft_type"] == "LORA":
        tags.add("lora")
    if base.name:
        tags.add("transformers")
    if path := fields.get("base_model_name_or_path"):
        data.base_model = data.base_model or path
        tags.add(f"base_model:adapter:{path}")
    if fields.get("task_type") == "CAUSAL_LM":
        data.pipeline_tag = data.pipeline_tag or "text-generation"
    data.tags = sorted(tags)


def _section(fields: dict, name: str, subfolder: str, base: Base, note: str) -> str:
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
    if base.name and path:
        labels = "" if base.labels is None else f", num_labels={base.labels}"
        load = [f"base = {base.name}.from_pretrained({path!r}{labels})"]
        lines += [f"from transformers import {base.name}"]
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
