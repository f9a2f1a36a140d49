"""``randlora merge``: W + dW into a copy of the model's files, a layer at a time."""

import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..writing import appear_new
from . import CliError, check_free
from .adapter import Change, changes_of, read_adapter, shapes_in
from .checkpoint import Checkpoint, locate, read_checkpoint

# Weights in other formats would be those of the unmerged model.
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}


def merge(model: Path, source: Path, out: Path) -> int:
    """Writes the model folder `out`: the files of `model` with the adapter in their weights.

    The tensors are those of ``PeftModel.from_pretrained(...).merge_and_unload(safe_merge=True)``.
    Every other byte of the files stays. Needs the memory of two copies of the adapter and of one
    layer, and the disk space of the model.
    """
    check_free(out)
    adapter, checkpoint = read_adapter(source), read_checkpoint(model)
    name_in = locate(adapter.diagonals, checkpoint)
    replaced = {name_in(name): tensor for name, tensor in adapter.others.items()}
    changes = changes_of(adapter, shapes_in(adapter, checkpoint))
    path_of = {name_in(f"{path}.weight"): path for path in changes}
    for path, saved in (adapter.plain or {}).items():  # tied weights that the files hold twice
        copies = (name_in(f"{other}.weight") for other in saved.also_at)
        path_of |= {name: path for name in copies if name in checkpoint.tensors}
    written = path_of.keys() | replaced.keys()
    _check_names(checkpoint, replaced, written)
    _check_space(checkpoint, out)
    with appear_new(out) as folder:
        folder.mkdir()
        for file in checkpoint.files:
            print(f"merging {file.name}", file=sys.stderr)
            shutil.copyfile(file, folder / file.name)
            with open(folder / file.name, "r+b") as copy:
                for name in written:
                    entry = checkpoint.tensors[name]
                    if entry.file != file:
                        continue
                    weight = replaced[name] if name in replaced else checkpoint.read(name)
                    weight = weight.to(entry.dtype)
                    if name in path_of:
                        weight = _sum(path_of[name], changes[path_of[name]], weight)
                    copy.seek(entry.start)
                    _write(copy, weight)
        left = _copy_rest(checkpoint, folder)
    print(f"{len(path_of)} layers merged into {len(checkpoint.files)} files of {out}")
    for names, told in (
        (replaced, "replaced by the adapter's own"),
        (adapter.ignored, "ignored, since PEFT would not load them"),
        (left, "not copied, since they hold unmerged weights or are folders"),
    ):
        if names:
            print(f"{told}: {', '.join(names)}")
    return 0


def _sum(path: str, change: Change, weight: Tensor) -> Tensor:
    total = change.added_to(weight)
    if not bool(torch.isfinite(total).all()):
        raise CliError(f"{path}: the merged weight would hold NaN or inf; nothing was written")
    return total


def _check_names(checkpoint: Checkpoint, replaced: dict[str, Tensor], written: set[str]) -> None:
    for name, tensor in replaced.items():
        entry = checkpoint.tensors.get(name)
        if entry is None or entry.shape != tuple(tensor.shape) or entry.dtype is None:
            raise CliError(
                f"the adapter holds {name} {tuple(tensor.shape)}, which {checkpoint.folder} does "
                "not hold in that shape; merge by PEFT's merge_and_unload"
            )
    if tied := next((name for name in written if checkpoint.is_tied(name)), None):
        raise CliError(f"{tied} is tied to another weight of the model; merge by PEFT")


def _write(stream, tensor: Tensor) -> None:
    stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _check_space(checkpoint: Checkpoint, out: Path) -> None:
    needed = sum(file.stat().st_size for file in checkpoint.files)
    free = shutil.disk_usage(out.absolute().parent).free
    if needed > free:
        raise CliError(f"{out} needs {needed:,} bytes; its disk has {free:,} free")


def _copy_rest(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Configuration, tokenizer and the like; returns what was left out."""
    left = []
    for path in sorted(checkpoint.folder.iterdir()):
        if path.name.startswith(".") or path in checkpoint.files:
            continue
        if path.is_file() and path.suffix not in _NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
        else:
            left.append(path.name)
    return left
