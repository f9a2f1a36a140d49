"""The file of `save_adapter`: one adapter and a description of its layers.

A safetensors file with ``PATH.randlora_lambda`` and ``PATH.randlora_gamma`` of every layer. Its
metadata "randlora_adapter" is JSON with adapter_name and layers. The object layers maps the path of
each layer in the base model to in_features, out_features, fan_in_fan_out, r, scaling,
randlora_dropout, basis (the key of a `BasisDescription`) and also_at (the other paths of a tied
layer).
"""

import json
import math
import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..basis.description import BasisDescription
from ..basis.ternary_basis import TernaryBasis
from ..writing import appear
from .state_dict import DIAGONALS

_METADATA = "randlora_adapter"


@dataclass(frozen=True)
class SavedLayer:
    """The adapter of one layer.

    Attributes:
        fan_in_fan_out: the base weight is stored as (in, out), as in transformers' Conv1D.
        also_at: other paths of the layer in the model.
    """

    basis: TernaryBasis
    scaling: float
    randlora_dropout: float
    fan_in_fan_out: bool
    lam: Tensor  # (r, n)
    gam: Tensor  # (n, d)
    also_at: tuple[str, ...] = ()

    @property
    def description(self) -> BasisDescription:
        assert self.basis.description is not None
        return self.basis.description


def write_adapter_file(
    path: str | os.PathLike, adapter_name: str, layers: dict[str, SavedLayer]
) -> None:
    """Writes layers by their paths in the base model; the file appears when it is complete.

    Raises ImportError without safetensors, and OSError, naming the file, if it cannot be written.
    """
    safetensors = _safetensors()
    tensors, described = {}, {}
    for at, layer in layers.items():
        basis = layer.basis
        described[at] = {
            "in_features": basis.in_features,
            "out_features": basis.out_features,
            "fan_in_fan_out": layer.fan_in_fan_out,
            "r": basis.r,
            "scaling": layer.scaling,
            "randlora_dropout": layer.randlora_dropout,
            "basis": layer.description.key(),
            "also_at": list(layer.also_at),
        }
        for name, tensor in zip(DIAGONALS, (layer.lam, layer.gam), strict=True):
            tensors[tensor_name(at, name)] = tensor.contiguous()
    text = json.dumps({"adapter_name": adapter_name, "layers": described})
    with appear(path) as scratch:
        safetensors.torch.save_file(tensors, scratch, {_METADATA: text})


def read_adapter_file(path: str | os.PathLike) -> tuple[str, dict[str, SavedLayer]]:
    """The adapter's name, and its layers by their paths in the base model.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
        ValueError: the file is damaged, or its description is missing or does not fit its tensors.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if text is None:
        raise ValueError(
            f"{path} does not say which bases it belongs to: it has no metadata {_METADATA!r}, "
            "which save_adapter writes"
        )
    try:
        values = json.loads(text)
        name, described = values["adapter_name"], values["layers"]
        layers = {at: _saved_layer(at, fields, tensors) for at, fields in described.items()}
        if not isinstance(name, str) or not layers:
            raise ValueError(f"adapter_name is {name!r} and there are {len(layers)} layers")
        if tensors:
            raise ValueError(f"tensor {min(tensors)!r} belongs to no layer")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no sound file of save_adapter: {reason}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: the JSON of its metadata is nested too deeply") from error
    return name, layers


def tensor_name(path: str, diagonals: str) -> str:
    """The name of a tensor in the file; `path` is empty if the model itself is the layer."""
    return f"{path}.{diagonals}" if path else diagonals


def _saved_layer(at: str, fields: dict, tensors: dict[str, Tensor]) -> SavedLayer:
    """Checks a layer's description, and takes its tensors out of `tensors`."""
    description = BasisDescription.parse(fields["basis"])
    sizes = fields["in_features"], fields["out_features"], fields["r"]
    basis = TernaryBasis(*sizes, description.density, description.seed, description.kind)
    for name, kinds in (
        ("scaling", (int, float)),
        ("randlora_dropout", (int, float)),
        ("fan_in_fan_out", bool),
        ("also_at", list),
    ):
        value = fields[name]
        if not isinstance(value, kinds) or isinstance(value, bool) != (kinds is bool):
            raise TypeError(f"{name} of {at!r} is {value!r}")
    scaling, dropout = float(fields["scaling"]), float(fields["randlora_dropout"])
    if not math.isfinite(scaling) or not 0 <= dropout < 1:
        raise ValueError(
            f"scaling of {at!r} must be finite and randlora_dropout in [0, 1), got {scaling} and "
            f"{dropout}"
        )
    lam, gam = (tensors.pop(tensor_name(at, name)) for name in DIAGONALS)
    check_shapes(at, lam, gam, basis.r, basis.d)
    also_at = tuple(map(str, fields["also_at"]))
    return SavedLayer(basis, scaling, dropout, fields["fan_in_fan_out"], lam, gam, also_at)


def check_shapes(at: str, lam: Tensor, gam: Tensor, r: int, d: int) -> None:
    """Raises ValueError unless lambda is (r, n) and gamma (n, d), floating point."""
    shapes = (r, -(-d // r)), (-(-d // r), d)
    if (lam.shape, gam.shape) != shapes or not (
        lam.is_floating_point() and gam.is_floating_point()
    ):
        raise ValueError(
            f"lambda and gamma of {at!r} must be floating point of shapes (r, n) = {shapes[0]} "
            f"and (n, d) = {shapes[1]}, got {lam.dtype} {tuple(lam.shape)} and {gam.dtype} "
            f"{tuple(gam.shape)}"
        )


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            'save_adapter and load_adapter need safetensors: pip install "randlora-ext[files]"'
        ) from error
    return safetensors
