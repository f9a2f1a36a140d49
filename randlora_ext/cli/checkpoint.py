"""A local model folder of safetensors files: which tensor lies where."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .adapter import read_json
from .errors import CliError, first_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Entry:
    """One tensor: its file, dtype (None: not float64, 32 or 16), shape, and first byte there."""

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    config: dict  # config.json; empty where there is none
    files: list[Path]
    tensors: dict[str, Entry]

    def read(self, name: str) -> Tensor:
        """One tensor; nothing else of its file is read."""
        with safe_open(self.tensors[name].file, framework="pt") as file:
            return file.get_tensor(name)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads headers alone. CliError where the folder has no sound safetensors files."""
    if not folder.is_dir():
        raise CliError(f"{folder} is no folder; a model folder has config.json and safetensors")
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX, "").get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in weight_map.values()
        ):
            raise CliError(f"{folder / INDEX} must map tensors to files of its folder")
        names = sorted(set(weight_map.values()))
    elif (folder / SINGLE).is_file():
        weight_map, names = None, [SINGLE]
    else:
        raise CliError(
            f"{folder} has neither {SINGLE} nor {INDEX}; other formats are not read: save the "
            "model by transformers' save_pretrained first"
        )
    tensors: dict[str, Entry] = {}
    for name in names:
        tensors.update(_entries(folder / name))
    if weight_map is not None:
        for tensor, name in weight_map.items():
            if tensor not in tensors or tensors[tensor].file.name != name:
                raise CliError(f"{folder / INDEX} says that {tensor} is in {name}; it is not")
    config = read_json(folder / "config.json", "") if (folder / "config.json").is_file() else {}
    return Checkpoint(folder, config, [folder / name for name in names], tensors)


def _entries(file: Path) -> dict[str, Entry]:
    if not file.is_file():
        raise CliError(f"{file} does not exist")
    try:
        with safe_open(file, framework="pt"):  # checks header, offsets and length
            pass
    except (SafetensorError, OSError) as error:
        raise CliError(f"{file} is damaged or no safetensors file: {first_line(error)}") from error
    # The library tells no offsets. Eight bytes of length, a JSON header, then the data.
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {
        name: Entry(
            file, _DTYPES.get(at["dtype"]), tuple(at["shape"]), 8 + length + at["data_offsets"][0]
        )
        for name, at in header.items()
        if name != "__metadata__"
    }


def find_base(name: str | None) -> Path:
    """The folder of a base model: a path, or a name in the hub's cache. Nothing is downloaded."""
    if not name:
        raise CliError("the adapter names no base model; give its folder by --base")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # its own errors, and those of its check of names
        raise CliError(
            f"base model {name!r} is neither a folder nor in the hub's cache; give its folder by "
            "--base"
        ) from error


def locate(paths: Iterable[str], checkpoint: Checkpoint) -> dict[str, str]:
    """The name of the weight of each layer of an adapter.

    An adapter of a bare LlamaModel has "layers.0...", the file of a LlamaForCausalLM
    "model.layers.0...", and the reverse: so one prefix may be put before all paths, or taken away.
    """
    paths = sorted(paths)
    first, names = paths[0], checkpoint.tensors
    parts = first.split(".")
    shorter = [".".join(parts[:k]) + "." for k in range(1, len(parts))]
    longer = [n.removesuffix(f"{first}.weight") for n in names if n.endswith(f".{first}.weight")]
    for added in ["", *sorted(longer, key=len)]:
        found = {path: f"{added}{path}.weight" for path in paths}
        if all(name in names for name in found.values()):
            return found
    for taken in shorter:
        found = {path: f"{path.removeprefix(taken)}.weight" for path in paths}
        if all(name in names for name in found.values()):
            return found
    missing = next((p for p in paths if f"{p}.weight" not in names), first)
    raise CliError(
        f"{checkpoint.folder} has no tensor {missing}.weight: the adapter is of another model, or "
        "that weight is tied to another"
    )
