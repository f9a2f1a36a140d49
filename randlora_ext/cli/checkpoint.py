"""A local model folder of safetensors files: which tensor lies where."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
# Experts that lie one by one, and the parameters that transformers makes of them: expert by expert
# the rows of the tensors, in the order of their names.
_EXPERT = re.compile(r"(.+)\.(\d+)\.(\w+)\.weight")
_FUSED = {
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj"),
    **dict.fromkeys(("down_proj", "w2"), "down_proj"),
}


class Entry(NamedTuple):
    """One tensor: its dtype (None unless it is in _DTYPES), shape, file, and bytes there."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


class Parameter(NamedTuple):
    """What the model has: a tensor of the folder, or the experts of some, as one."""

    names: list[str]  # of the tensors, whose rows follow one another
    dtype: torch.dtype | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    config: dict  # config.json; empty if there is none
    tensors: dict[str, Entry]
    parameters: dict[str, Parameter]

    @property
    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.tensors.values()})

    def read(self, name: str) -> Tensor:
        """One parameter; nothing else of its files is read."""
        tensors = []
        for part in self.parameters[name].names:
            with safe_open(self.tensors[part].file, framework="pt") as file:
                tensors.append(file.get_tensor(part))
        return torch.cat(tensors).view(self.parameters[name].shape)

    def write(self, folder: Path, name: str, value: Tensor) -> None:
        """One parameter, into copies of its files."""
        entries = [self.tensors[part] for part in self.parameters[name].names]
        parts = value.reshape(-1).view(torch.uint8).split([entry.size for entry in entries])
        for entry, part in zip(entries, parts, strict=True):
            with open(folder / entry.file.name, "r+b") as file:
                file.seek(entry.start)
                file.write(part.numpy().data)

    def configs(self) -> Iterator[dict]:
        """Of the model and of those it consists of, such as an encoder and a decoder."""
        waiting = [self.config]
        for config in waiting:
            yield config
            waiting += [value for value in config.values() if isinstance(value, dict)]

    def types(self) -> list[str]:
        """Of these models, as transformers calls them."""
        return [config["model_type"] for config in self.configs() if "model_type" in config]

    def is_tied(self, name: str) -> bool:
        """Whether the model may use this tensor for its embeddings and for its head."""
        rows = self.parameters[name].shape[:1]
        owners = [config for config in self.configs() if rows == (config.get("vocab_size"),)]
        # transformers 4 leaves a True out; a nested model may follow the outer one.
        told = [c.get("tie_word_embeddings") for c in (self.config, *owners)]
        return bool(owners) and (True in told or False not in told)


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    with told_of(path, (OSError, ValueError, RecursionError)):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"must hold a JSON object, got {type(values).__name__}")
    return values


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads only headers. CliError if the folder has no sound safetensors files."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    files = {SINGLE}
    if (folder / INDEX).is_file():
        with told_of(folder / INDEX, (LookupError, AttributeError, TypeError)):
            files = {Path(name).name for name in read_json(folder / INDEX)["weight_map"].values()}
    elif not (folder / SINGLE).is_file():
        raise CliError(
            f"{folder} is no folder with {SINGLE} or {INDEX}; other formats are not read: save the "
            "model by transformers' save_pretrained first"
        )
    tensors: dict[str, Entry] = {}
    for name in sorted(files):
        tensors |= _entries(folder / name)
    return Checkpoint(folder, config, tensors, _parameters(tensors))


def _parameters(tensors: dict[str, Entry]) -> dict[str, Parameter]:
    found = {name: Parameter([name], *entry[:2]) for name, entry in tensors.items()}
    experts = [m for m in map(_EXPERT.fullmatch, tensors) if m and m[3] in _FUSED]
    fused: dict[str, list[re.Match]] = {}
    for match in sorted(experts, key=lambda match: (int(match[2]), match[3])):
        path = match[1].replace(".block_sparse_moe.", ".mlp.")  # Mixtral's
        fused.setdefault(f"{path}.{_FUSED[match[3]]}", []).append(match)
    for name, parts in fused.items():
        kinds = {tensors[match[0]][:2] for match in parts}
        count, (dtype, shape) = len({match[2] for match in parts}), kinds.pop()
        if not kinds and len(shape) == 2 and len(parts) % count == 0:
            rows = len(parts) // count * shape[0]
            found[name] = Parameter([m[0] for m in parts], dtype, (count, rows, shape[1]))
    return found


def _entries(file: Path) -> dict[str, Entry]:
    with told_of(f"{file} cannot be read", (SafetensorError, OSError)):
        with safe_open(file, framework="pt"):  # checks header, offsets and length
            pass
    # The library does not give offsets. Eight bytes of length, a JSON header, then the data.
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    found = {}
    for name in header.keys() - {"__metadata__"}:
        dtype, shape, (start, end) = (header[name][k] for k in ("dtype", "shape", "data_offsets"))
        found[name] = Entry(_DTYPES.get(dtype), tuple(shape), file, 8 + length + start, end - start)
    return found


def locate(names: list[str], checkpoint: Checkpoint) -> Callable[[str], str]:
    """Maps an adapter's names of parameters to the checkpoint's; `names` are those that it changes.

    An adapter of a bare LlamaModel has "layers.0...", the file of a LlamaForCausalLM
    "model.layers.0...", and the reverse: one prefix may be added to all names, or removed.
    """
    known, first = checkpoint.parameters, names[0]
    for name in sorted(known, key=lambda name: abs(len(name) - len(first))):
        if f".{name}".endswith(f".{first}") or f".{first}".endswith(f".{name}"):
            add, take = name[: -len(first)], first[: -len(name)]
            if all(add + name.removeprefix(take) in known for name in names):
                return lambda name: add + name.removeprefix(take)
    missing = next((name for name in names if name not in known), first)
    raise CliError(
        f"{checkpoint.folder} has no tensor {missing}, nor what it is made of: the adapter is of "
        "another model, or that weight is tied to another; merge by merge_and_unload()"
    )
