"""``--merge MODEL ADAPTER OUT``: W + dW into a copy of the model's files, a layer at a time."""

import shutil
import zlib
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..ops.functional import merged_weight
from ..peft.layer import AcceleratedLinear
from .adapter import Adapter, read_adapter
from .checkpoint import Checkpoint, locate, read_checkpoint
from .errors import CliError
from .outputs import check_free, new_folder
from .skeleton import adapted_layers, shapes_of, skeleton

# Weights in other formats would be those of the unmerged model.
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}


def merge(model: Path, adapter: Path, out: Path, rounding_seed: int | None = None) -> int:
    """Writes the model folder `out`: the files of `model` with the adapter in their weights.

    The tensors are those of ``PeftModel.from_pretrained(...).merge_and_unload(safe_merge=True)``:
    W + dW is made in float32 (float64 for a float64 W) and rounded once to W's dtype. Every other
    byte of the files stays. Needs the memory of the adapter and of one layer, and the disk space of
    the model.

    Args:
        rounding_seed: in [0, 2**64): rounds 16-bit weights stochastically, see `merged_weight`. The
            seed of a layer is ``rounding_seed ^ (zlib.crc32(path.encode()) << 32)``.
    """
    if rounding_seed is not None and not 0 <= rounding_seed < 2**64:
        raise CliError(f"--rounding-seed must be in [0, 2**64), got {rounding_seed}")
    check_free(out)
    source, checkpoint = read_adapter(adapter), read_checkpoint(model)
    replaced = _replaced(source, checkpoint)
    layers = adapted_layers(skeleton(source, shapes_of(source, checkpoint)))
    names = locate(source.layers, checkpoint)
    _check_space(checkpoint, out)
    with (
        new_folder(out) as folder,
        tqdm(total=len(checkpoint.files) + len(layers), desc="merging", unit="step") as bar,
    ):
        for file in checkpoint.files:
            bar.set_postfix_str(file.name)
            shutil.copyfile(file, folder / file.name)
            bar.update()
            with open(folder / file.name, "r+b") as copy:
                for path, layer in layers.items():
                    if checkpoint.tensors[names[path]].file != file:
                        continue
                    weight = checkpoint.read(names[path])
                    total = _sum(path, layer, weight, source.config.fan_in_fan_out, rounding_seed)
                    _write(copy, checkpoint, names[path], total)
                    bar.update()
                for name, tensor in replaced.items():
                    if checkpoint.tensors[name].file == file:
                        _write(copy, checkpoint, name, tensor)
        left = _copy_rest(checkpoint, folder)
    print(f"{len(layers)} layers merged into {len(checkpoint.files)} files of {out}")
    if replaced:
        print(f"replaced by the adapter's own: {', '.join(replaced)}")
    if left:
        print(f"not copied, since they hold unmerged weights or are folders: {', '.join(left)}")
    return 0


@torch.no_grad()
def _sum(
    path: str, layer: AcceleratedLinear, weight: Tensor, transposed: bool, seed: int | None
) -> Tensor:
    """W + dW in the dtype and orientation of W."""
    weight = weight.T.contiguous() if transposed else weight
    basis, reason = layer.basis_of("default", weight.device)
    if seed is not None and (basis is None or weight.itemsize != 2):
        what = reason or f"its weight is {weight.dtype}"
        raise CliError(f"{path}: --rounding-seed needs ternary bases and 16-bit weights; {what}")
    if basis is None:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        total = (wide + layer.get_delta_weight("default")).to(weight.dtype)
    else:
        lam, gam = (d["default"].detach() for d in (layer.randlora_lambda, layer.randlora_gamma))
        if seed is not None:
            seed ^= zlib.crc32(path.encode()) << 32
        total = merged_weight(basis, weight, lam, gam, layer.scaling["default"], seed)
    if not bool(torch.isfinite(total).all()):
        raise CliError(f"{path}: the merged weight would hold NaN or inf; nothing was written")
    return total.T if transposed else total


def _replaced(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Tensors of modules_to_save and biases, by their name in the checkpoint."""
    path, name = next(iter(locate(adapter.layers, checkpoint).items()))
    prefix = name.removesuffix(f"{path}.weight") if name.endswith(f"{path}.weight") else ""
    tied = checkpoint.config.get("tie_word_embeddings", False)
    vocabulary = checkpoint.config.get("vocab_size")
    replaced = {}
    for path, tensor in adapter.others.items():
        entry = checkpoint.tensors.get(name := prefix + path)
        if entry is None or entry.shape != tuple(tensor.shape) or entry.dtype is None:
            raise CliError(
                f"the adapter holds {path} {tuple(tensor.shape)}, which {checkpoint.folder} does "
                "not hold in that shape; merge by PEFT's merge_and_unload"
            )
        if tied and entry.shape[:1] == (vocabulary,):
            raise CliError(f"{name} is the adapter's own, but tied in the model; merge by PEFT")
        replaced[name] = tensor.to(entry.dtype)
    return replaced


def _write(stream, checkpoint: Checkpoint, name: str, tensor: Tensor) -> None:
    stream.seek(checkpoint.tensors[name].start)
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
