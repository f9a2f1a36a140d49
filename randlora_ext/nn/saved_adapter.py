"""A saved adapter as PEFT writes it, read without PEFT and without the model (docs/formats.md)."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..basis import Basis
from ..files import read_safetensors
from .adapter_config import SPARSE, description_from_fields, fields_of
from .adapter_record import RECORD_KEY, check_records, read_record, record_of
from .paths import in_base_model, nesting
from .state_dict import (
    DIAGONALS,
    INPUT_SCALE,
    input_scale_misfits,
    missing_input_scale,
    tensor_misfits,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # in front of every path of the base model
NOT_HERE = "does not exist here; of the hub's, `hf download NAME --local-dir FOLDER` makes a folder"
BASIS_NAMES = ("randlora_A", "randlora_B")  # of bases that PEFT draws
# What PEFT's configuration may say beside target_modules of which modules are adapted.
_LIMITS = "layers_to_transform", "layers_pattern", "exclude_modules"
_OF_LAYERS = (*DIAGONALS, INPUT_SCALE, RECORD_KEY)


class SavedAdapter:
    """The configuration and the tensors of one adapter, which belong together.

    Args:
        place: what messages call it.
        saved: the fields of adapter_config.json; those that it lacks have PEFT's defaults.
        tensors: by their names in adapter_model.safetensors.

    Attributes:
        place, tensors: as given.
        fields: as `fields_of` gives them; of these r, randlora_alpha and ``targets``, which are its
            target_parameters, have attributes, too.
        target_modules: which modules were adapted, as `apply_randlora` takes it; None if other
            fields decide, too.
        basis: what generates the bases; None if PEFT draws them.
        layers: the tensors of each layer, as ``layers[path][name]``: the layer's path in the file
            (`names` gives that in the base model) and a name such as "randlora_lambda".
        bases: A and B, if they are saved.
        others: what else is saved, by the names in the base model.
        base_weights: which of these are weights below an adapter.

    Raises TypeError or ValueError, naming the field or the tensor, if one is not allowed or
    missing, or if the tensors do not belong to the configuration.
    """

    def __init__(self, place: str, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.place, self.tensors = place, tensors
        self.fields = fields_of(saved)
        limited = any(saved.get(name) not in (None, []) for name in _LIMITS)
        self.target_modules = None if limited else saved.get("target_modules")
        self.basis = description_from_fields(self.fields)
        self.r: int = self.fields["r"]
        self.randlora_alpha: float = self.fields["randlora_alpha"]
        self.scaling = self.randlora_alpha / self.r
        self.targets: list[str] = self.fields["target_parameters"] or []
        if self.basis is not None:
            own = record_of(self.basis.key(), self.r, self.randlora_alpha, self.targets)
            check_records(tensors, own, place)
        self.layers: dict[str, dict[str, Tensor]] = {}
        self.bases: dict[str, Tensor] = {}
        self.others: dict[str, Tensor] = {}
        self.base_weights: set[str] = set()
        # Safetensors have no order.
        self._sort({f".{key.removeprefix(PREFIX)}": tensors[key] for key in sorted(tensors)})

    def _sort(self, tensors: dict[str, Tensor]) -> None:
        rest = {}
        for key, tensor in tensors.items():
            name = next((name for name in _OF_LAYERS if key.endswith(f".{name}")), None)
            if name is None:
                rest[key] = tensor
            else:
                path = key[1:].removesuffix(name).removesuffix(".")
                self.layers.setdefault(path, {})[name] = tensor
        self._check_complete()
        for key, tensor in rest.items():
            path, _, last = key[1:].rpartition(".")
            if last in BASIS_NAMES:  # PEFT up to 0.21.2 saves them again under every layer
                self.bases.setdefault(last, tensor)
            elif path in self.layers:
                raise ValueError(f"it has {key[1:]}, which an adapted layer does not have")
            else:
                in_model = in_base_model(key[1:], self.layers)
                self.others[in_model] = tensor
                if key.endswith(".base_layer.weight"):
                    self.base_weights.add(in_model)

    def _check_complete(self) -> None:
        if not self.layers:
            raise ValueError("it holds no randlora_lambda: it is no RandLoRA adapter")
        on_hadamard = self.basis is not None and self.basis.kind == "hadamard"
        for path, tensors in self.layers.items():
            for part in DIAGONALS:
                if part not in tensors:
                    raise ValueError(f"{PREFIX}{path}.{part} is missing")
            if on_hadamard and INPUT_SCALE not in tensors:
                raise ValueError(missing_input_scale(f"{PREFIX}{path}.{INPUT_SCALE}"))

    def digest(self) -> str:
        """The same for the same adapter in any folder: SHA-256 of what it computes with."""
        fields = "r", "randlora_alpha", "projection_prng_key", *SPARSE
        found = hashlib.sha256(json.dumps([self.fields[name] for name in fields]).encode())
        tensors = dict(self.others)
        for path, of_layer in self.layers.items():
            tensors |= {f"{path}.{name}": tensor for name, tensor in of_layer.items()}
        for name in sorted(tensors):
            tensor = tensors[name].contiguous()
            found.update(json.dumps([name, str(tensor.dtype), *tensor.shape]).encode())
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def experts(self, path: str) -> tuple[int, ...]:
        """How many experts the layer has; () if it is a linear layer."""
        return tuple(self.layers[path][DIAGONALS[0]].shape[:-2])

    def sizes(self, path: str) -> tuple[int, int] | None:
        """(in_features, out_features) of the layer; None on PEFT's bases, which do not say."""
        if self.basis is None:
            return None
        record = read_record(f"{path}.{RECORD_KEY}", self.layers[path][RECORD_KEY])
        return record["in_features"], record["out_features"]

    def misfits(self, path: str, basis: Basis, experts: Sequence[int]) -> Iterator[str]:
        """Why the tensors of a layer do not fit one of these sizes."""
        tensors, sizes = self.layers[path], (basis.in_features, basis.out_features)
        saved_sizes = self.sizes(path)
        if saved_sizes not in (None, sizes):
            yield f"{path} is of in_features and out_features {saved_sizes}, and must be of {sizes}"
        for part, shape in zip(DIAGONALS, (basis.lam_shape, basis.gam_shape), strict=True):
            like = torch.empty(*experts, *shape, device="meta")
            yield from tensor_misfits(f"{path}.{part}", tensors[part], like)
        key = f"{path}.{INPUT_SCALE}"
        if basis.kind == "hadamard":
            like = torch.empty(*experts, basis.in_features, device="meta")
            yield from input_scale_misfits(key, tensors[INPUT_SCALE], like)
        elif INPUT_SCALE in tensors:
            yield f"{key} goes with Hadamard bases, and these are {basis.kind}"

    def have_equal_tensors(self, path: str, other_path: str) -> bool:
        """Whether two layers do, as they must if they are one, tied, module."""
        one, other = self.layers[path], self.layers[other_path]
        return one.keys() == other.keys() and all(
            one[name].dtype == other[name].dtype and torch.equal(one[name], other[name])
            for name in one
        )

    def names(self, known: Container[str] = ()) -> dict[str, str]:
        """What each layer, by its path in the file, adapts in the base model: the path of a module
        or, of experts, the name of a parameter. `known` has the names of the model's parameters.

        The layers of several parameters of one module are nested in the order of
        ``target_parameters``, the first one innermost. ValueError if these do not say which.
        """
        modules = {path: in_base_model(path, self.layers) for path in self.layers}
        counts = Counter(modules.values())
        names = {}
        for path, module in modules.items():
            if not self.experts(path):
                names[path] = module
                continue
            parameters = self._targets_in(module)
            if len(parameters) != counts[module]:
                parameters = [name for name in parameters if name in known]
            if len(parameters) != counts[module]:
                raise ValueError(
                    f"{self.place}: {module} has {counts[module]} layers of parameters, and "
                    f"target_parameters {self.targets} name {parameters} of them"
                )
            names[path] = parameters[-1 - nesting(path, self.layers)]
        return names

    def _targets_in(self, module: str) -> list[str]:
        """The parameters of a module of that path that ``target_parameters`` may name."""
        found = []
        for target in self.targets:
            name = f"{module}.{target.rpartition('.')[2]}"
            if f".{name}".endswith(f".{target}") and name not in found:
                found.append(name)
        return found

    def first_missing(self, names: Iterable[str], others: Container[str]) -> str | None:
        """In words, the first parameter that the adapter should hold and does not; None if it holds
        all. It should hold each of a module in ``modules_to_save``.

        Args:
            names: of the model's parameters.
            others: those that the adapter holds, beside the layers' tensors.
        """
        for name in names:
            for module in self.fields["modules_to_save"] or ():
                if f".{module}." in f".{name}" and name not in others:
                    return f"it lacks {name}, though modules_to_save has {module!r}"
        return None


def read_adapter(folder: str | os.PathLike) -> SavedAdapter:
    """The adapter in a folder of `save_adapter` or of PEFT's ``save_pretrained``.

    Each file is opened once, so that another process may save meanwhile. OSError if one cannot be
    read; ValueError, naming the folder, if the adapter is damaged or no RandLoRA adapter.
    """
    if not os.path.exists(folder):
        raise FileNotFoundError(f"{os.fspath(folder)} {NOT_HERE}")
    if not os.path.isdir(folder):
        raise NotADirectoryError(
            f"{os.fspath(folder)} is a file; an adapter is a folder with {CONFIG} and {WEIGHTS}"
        )
    config, weights = Path(folder, CONFIG), Path(folder, WEIGHTS)
    text = config.read_bytes()
    pickled = weights.with_suffix(".bin")
    if not weights.exists() and pickled.exists():
        raise ValueError(f"{pickled} is a pickle: open it by PEFT and save it again")
    try:
        saved = json.loads(text)
        if not isinstance(saved, dict):
            raise ValueError(f"must hold a JSON object, got {type(saved).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config}: {error}") from error
    tensors, _ = read_safetensors(weights)
    try:
        return SavedAdapter(os.fspath(folder), saved, tensors)
    except (TypeError, ValueError) as error:
        place, message = os.fspath(folder), str(error)
        if not message.startswith(place):
            message = f"{place}: {message}"
        raise ValueError(message) from error
