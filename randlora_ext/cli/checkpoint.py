"""A local model folder of safetensors files: which tensor lies where."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import CliError, told_of

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Entry:
    """One tensor: its file, dtype (None unless it is in _DTYPES), shape, and first byte."""

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    config: dict  # config.json; empty if there is none
    tensors: dict[str, Entry]

    @property
    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.tensors.values()})

    def read(self, name: str) -> Tensor:
        """One tensor; nothing else of its file is read."""
        with safe_open(self.tensors[name].file, framework="pt") as file:
            return file.get_tensor(name)

    def configs(self) -> Iterator[dict]:
        """Of the model and of those it consists of, such as an encoder and a decoder."""
        waiting = [self.config]
        for config in waiting:
            yield config
            waiting += [value for value in config.values() if isinstance(value, dict)]

    def is_tied(self, name: str) -> bool:
        """Whether the model may use this tensor for its embeddings and for its head."""
        rows = self.tensors[name].shape[:1]
        owners = [config for config in self.configs() if rows == (config.get("vocab_size"),)]
        # transformers 4 leaves a True out; a nested model may follow the outer one.
        told = [c.get("tie_word_embeddings") for c in (self.config, *owners)]
        return bool(owners) and (True in told or False not in told)


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    if not path.is_file():
        raise CliError(f"{path} does not exist")
    with told_of(f"{path} is no JSON", (OSError, ValueError, RecursionError)):
        values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise CliError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads only headers. CliError if the folder has no sound safetensors files."""
    if not folder.is_dir():
        raise CliError(f"{folder} is no folder; a model folder has config.json and safetensors")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise CliError(
                f"{folder} has neither {SINGLE} nor {INDEX}; other formats are not read: save the "
                "model by transformers' save_pretrained first"
            )
        return Checkpoint(folder, config, _entries(folder / SINGLE))
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise CliError(f"{folder / INDEX} must map tensors to files of its folder")
    tensors: dict[str, Entry] = {}
    for name in sorted(set(weight_map.values())):
        tensors |= _entries(folder / name)
    return Checkpoint(folder, config, tensors)


def _entries(file: Path) -> dict[str, Entry]:
    if not file.is_file():
        raise CliError(f"{file} does not exist")
    with told_of(f"{file} is damaged or no safetensors file", (SafetensorError, OSError)):
        with safe_open(file, framework="pt"):  # checks header, offsets and length
            pass
    # The library does not give offsets. Eight bytes of length, a JSON header, then the data.
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


def locate(names: Iterable[str], checkpoint: Checkpoint) -> Callable[[str], str]:
    """Maps an adapter's names of tensors to the checkpoint's; `names` are those that it changes.

    An adapter of a bare LlamaModel has "layers.0...", the file of a LlamaForCausalLM
    "model.layers.0...", and the reverse: one prefix may be added to all names, or removed.
    """
    names, tensors = sorted(names), checkpoint.tensors
    last = f".{names[0]}"
    longer = sorted((n.removesuffix(last[1:]) for n in tensors if n.endswith(last)), key=len)
    parts = names[0].split(".")
    shorter = [".".join(parts[:k]) + "." for k in range(1, len(parts))]
    for add, take in [("", ""), *((p, "") for p in longer), *(("", p) for p in shorter)]:

        def rename(name: str, add: str = add, take: str = take) -> str:
            return add + name.removeprefix(take)

        if all(rename(name) in tensors for name in names):
            return rename
    missing = next((name for name in names if name not in tensors), names[0])
    raise CliError(
        f"{checkpoint.folder} has no tensor {missing}: the adapter is of another model, or "
        "that weight is tied to another"
    )
