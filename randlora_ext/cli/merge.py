"""``randlora merge``: W + dW into a copy of the model's files, a layer at a time."""

import json
import shutil
import sys
from collections.abc import Sized
from pathlib import Path

import torch
from torch import Tensor

from ..files import appear
from ..nn.saved_adapter import NOT_HERE
from . import CliError, errors_about
from .adapter import read_changes
from .checkpoint import Checkpoint, read_checkpoint, read_json

MERGED = "randlora_merged.json"  # which adapters are in the weights
# Weights in other formats would be those of the unmerged model.
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}


def merge(model: Path, source: Path, out: Path) -> int:
    """Writes the model folder `out`: the files of `model` with the adapter in their weights.

    The tensors are those of ``PeftModel.from_pretrained(...).merge_and_unload(safe_merge=True)``.
    Every other byte of the files stays. Needs the memory of two copies of the adapter and of one
    layer, and the disk space of the model.
    """
    for operand, place in (("MODEL", model), ("ADAPTER", source)):
        if not place.exists():
            raise CliError(f"{operand} {place} {NOT_HERE}")
    checkpoint = read_checkpoint(model)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CliError(f"{out} exists; choose another name or remove it first")
    with appear(out) as folder:
        added, replaced, digest = read_changes(source, checkpoint)
        merged = _merged_before(model, source, digest)
        written = sorted(added.keys() | replaced.keys())
        _check_names(checkpoint, replaced, written)
        left = _copy(checkpoint, folder)
        merged.append({"adapter": str(source), "sha256": digest})
        (folder / MERGED).write_text(json.dumps({"merged": merged}, indent=2) + "\n")
        for name in written:
            print(f"merging {name}", file=sys.stderr)
            weight = replaced[name] if name in replaced else checkpoint.read(name)
            weight = weight.to(checkpoint.parameters[name].dtype)
            if name in added:
                weight = added[name](weight)
                if not bool(torch.isfinite(weight).all()):
                    raise CliError(f"{name} would hold NaN or inf after merging")
            checkpoint.write(folder, name, weight)
    layers, files = _count(added, "layer"), _count(checkpoint.files, "file")
    print(f"{layers} merged into {files} of {out}")
    if replaced:
        print("replaced by the adapter's own:", ", ".join(replaced))
    if left:
        print("not copied, since they hold unmerged weights or are folders:", ", ".join(left))
    return 0


def _merged_before(model: Path, source: Path, digest: str) -> list[dict]:
    """What the folder says of adapters in its weights; CliError if this one is among them."""
    if not (model / MERGED).exists():
        return []
    with errors_about(model / MERGED, (AttributeError, KeyError, TypeError)):
        merged = [
            {"adapter": each["adapter"], "sha256": each["sha256"]}
            for each in read_json(model / MERGED)["merged"]
        ]
    for each in merged:
        if each["sha256"] == digest:
            raise CliError(
                f"{model} holds {source} already, which was merged from {each['adapter']}: twice "
                f"would add it twice ({MERGED} lists what is in the weights)"
            )
    return merged


def _check_names(checkpoint: Checkpoint, replaced: dict[str, Tensor], written: list[str]) -> None:
    for name, tensor in replaced.items():
        parameter = checkpoint.parameters.get(name)
        shape = tuple(tensor.shape)
        if parameter is None or parameter.shape != shape or parameter.dtype is None:
            raise CliError(
                f"the adapter holds {name} {shape}, which {checkpoint.folder} does "
                "not hold in that shape; merge by merge_and_unload"
            )
    for name in written:
        if checkpoint.is_tied(name):
            raise CliError(
                f"{name} is tied to another weight of the model; merge by merge_and_unload"
            )


def _copy(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Tensors, configuration, tokenizer and the like; returns what was left out."""
    folder.mkdir()
    files, left = checkpoint.files, []
    for path in sorted(p for p in checkpoint.folder.iterdir() if not p.name.startswith(".")):
        if path in files or (path.is_file() and path.suffix not in _NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
        else:
            left.append(path.name)
    return left


def _count(things: Sized, name: str) -> str:
    return f"{len(things)} {name}" if len(things) == 1 else f"{len(things)} {name}s"
