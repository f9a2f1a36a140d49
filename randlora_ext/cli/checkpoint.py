"""A local model folder of safetensors files: which tensor lies where."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import CliError, errors_about

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Experts that lie one by one.
_EXPERT = re.compile(
    r"(?P<path>.+)\.(?P<expert>\d+)\."
    r"(?:(?P<gate_or_up>gate_proj|up_proj|w1|w3)|down_proj|w2)\.weight"
)


class Place(NamedTuple):
    """Of a tensor in a file, in bytes."""

    file: Path
    start: int
    size: int


class Parameter(NamedTuple):
    """A tensor of the folder, or experts that lie one by one, as transformers stacks them."""

    dtype: torch.dtype | None  # None unless it is in _DTYPES
    shape: tuple[int, ...]
    places: list[Place]  # of the whole tensor, or of the parts of a stack in their order


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    config: dict  # config.json; empty if there is none
    parameters: dict[str, Parameter]

    @property
    def files(self) -> set[Path]:
        return {place.file for each in self.parameters.values() for place in each.places}

    def read(self, name: str) -> Tensor:
        dtype, shape, places = self.parameters[name]
        assert dtype is not None
        parts = [np.fromfile(at.file, np.uint8, at.size, offset=at.start) for at in places]
        return torch.from_numpy(np.concatenate(parts)).view(dtype).view(shape)

    def write(self, folder: Path, name: str, value: Tensor) -> None:
        """Into copies of the files."""
        places = self.parameters[name].places
        parts = value.reshape(-1).view(torch.uint8).split([place.size for place in places])
        for place, part in zip(places, parts, strict=True):
            with open(folder / place.file.name, "r+b") as stream:
                stream.seek(place.start)
                stream.write(part.numpy().data)

    def configs(self) -> Iterator[dict]:
        """Of the model and of those it consists of, such as an encoder and a decoder."""
        waiting = [self.config]
        for config in waiting:
            yield config
            waiting += [value for value in config.values() if isinstance(value, dict)]

    @property
    def types(self) -> set[str]:
        return {each["model_type"] for each in self.configs() if "model_type" in each}

    def is_tied(self, name: str) -> bool:
        """Whether the model may use this tensor for its embeddings and for its head."""
        rows = self.parameters[name].shape[:1]
        owners = [config for config in self.configs() if rows == (config.get("vocab_size"),)]
        if not owners:
            return False
        # transformers 4 leaves a True out; a nested model may follow the outer one.
        said = [config.get("tie_word_embeddings") for config in (self.config, *owners)]
        return True in said or False not in said


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    with errors_about(path, (OSError, ValueError, RecursionError)):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"must hold a JSON object, got {type(values).__name__}")
    return values


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads only headers. CliError if the folder has no sound safetensors files."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        with errors_about(index, (LookupError, AttributeError, TypeError)):
            files = {Path(name).name for name in read_json(index)["weight_map"].values()}
    tensors: dict[str, Parameter] = {}
    for name in sorted(files):
        tensors |= _tensors(folder / name)
    return Checkpoint(folder, config, _experts(tensors) | tensors)


def _tensors(file: Path) -> dict[str, Parameter]:
    needed = f"{file} must be a sound safetensors file, as transformers' save_pretrained writes it"
    with errors_about(needed, (SafetensorError, OSError)), safe_open(file, framework="pt"):
        pass  # it has checked header, offsets and length
    # The library does not give offsets. Eight bytes of length, a JSON header, then the data.
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        place = Place(file, 8 + length + start, end - start)
        found[name] = Parameter(_DTYPES.get(entry["dtype"]), tuple(entry["shape"]), [place])
    return found


def _experts(tensors: dict[str, Parameter]) -> dict[str, Parameter]:
    """The stacks, by their names in the model: expert by expert all rows, gate above up."""
    matches = [match for match in map(_EXPERT.fullmatch, tensors) if match]
    stacks: dict[str, list[re.Match]] = {}
    for match in sorted(matches, key=lambda match: (int(match["expert"]), match.string)):
        path = match["path"].replace(".block_sparse_moe.", ".mlp.")  # Mixtral's
        name = "gate_up_proj" if match["gate_or_up"] else "down_proj"
        stacks.setdefault(f"{path}.{name}", []).append(match)
    found = {}
    for name, matches in stacks.items():
        parts = [tensors[match.string] for match in matches]
        experts = len({match["expert"] for match in matches})
        dtype, shape = parts[0].dtype, parts[0].shape
        are_alike = all((part.dtype, part.shape) == (dtype, shape) for part in parts)
        if are_alike and len(shape) == 2 and len(parts) % experts == 0:
            rows, columns = len(parts) // experts * shape[0], shape[1]
            places = [part.places[0] for part in parts]
            found[name] = Parameter(dtype, (experts, rows, columns), places)
    return found


def locate(names: list[str], checkpoint: Checkpoint) -> Callable[[str], str]:
    """Maps an adapter's names of parameters to the checkpoint's; `names` are those that it changes.

    An adapter of a bare LlamaModel has "layers.0...", the file of a LlamaForCausalLM
    "model.layers.0...", and the reverse: one prefix may be added to all names, or removed.
    """
    known, first = checkpoint.parameters, names[0]

    def in_checkpoint(name: str, to_add: str, to_remove: str) -> str:
        return to_add + name.removeprefix(to_remove)

    for name in sorted(known, key=lambda name: abs(len(name) - len(first))):
        if f".{name}".endswith(f".{first}") or f".{first}".endswith(f".{name}"):
            prefixes = {"to_add": name[: -len(first)], "to_remove": first[: -len(name)]}
            if all(in_checkpoint(name, **prefixes) in known for name in names):
                return partial(in_checkpoint, **prefixes)
    missing = next((name for name in names if name not in known), first)
    raise CliError(
        f"{checkpoint.folder} has no tensor {missing}, nor what it is made of: the adapter is of "
        "another model, or that weight is tied to another; merge by merge_and_unload()"
    )
