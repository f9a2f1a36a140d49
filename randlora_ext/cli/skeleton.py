"""An adapter on layers that have its base model's shapes and no weights, so that PEFT reads it."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import peft
import torch
from torch import nn

from ..peft.layer import AcceleratedLinear
from .adapter import GAMMA, LAMBDA, Adapter
from .checkpoint import Checkpoint, locate
from .errors import CliError, first_line
from .plain_file import PREFIX


@dataclasses.dataclass(frozen=True)
class Shape:
    out_features: int
    in_features: int
    dtype: torch.dtype = torch.float32


def shapes_of(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Shape]:
    """The base layers' shapes by path. CliError where the adapter does not fit."""
    if "quantization_config" in checkpoint.config:
        raise CliError(f"{checkpoint.folder} is quantized; its 16 or 32 bit original is needed")
    shapes = {}
    for path, name in locate(adapter.layers, checkpoint).items():
        entry, d = checkpoint.tensors[name], adapter.layers[path][1].shape[1]
        if entry.dtype is None or len(entry.shape) != 2:
            raise CliError(
                f"{entry.file}: {name} must be a float64, float32, float16 or bfloat16 matrix"
            )
        if min(entry.shape) != d:
            raise CliError(
                f"{path}: the adapter is for min(in, out) = {d} features, the weight in "
                f"{checkpoint.folder} is {entry.shape}"
            )
        out_in = entry.shape[::-1] if adapter.config.fan_in_fan_out else entry.shape
        shapes[path] = Shape(*out_in, entry.dtype)
    return shapes


def skeleton(
    adapter: Adapter, shapes: Mapping[str, Shape], saved_bases: bool = True
) -> peft.PeftModel:
    """A PeftModel whose layers have the adapter's numbers, and weights that take no memory.

    Its bases are those that the adapter has on the real model: read, drawn by PEFT or generated.
    With saved_bases=False drawn or generated even where they are saved.
    """
    root = nn.Module()
    for path, shape in shapes.items():
        *parents, leaf = path.split(".")
        parent = root
        for name in parents:
            if not hasattr(parent, name):
                parent.add_module(name, nn.Module())
            parent = getattr(parent, name)
        parent.add_module(leaf, _weightless(shape))
    known = {field.name for field in dataclasses.fields(adapter.config)}
    narrowed = {
        "target_modules": list(shapes),
        "exclude_modules": None,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "bias": "none",
        "task_type": None,
        "inference_mode": True,
        "save_projection": bool(adapter.bases) and saved_bases,
        "fan_in_fan_out": False,  # shapes are (out, in)
    }
    state = {}
    for path in shapes:
        lam, gam = adapter.layers[path]
        state[f"{PREFIX}{path}{LAMBDA}"], state[f"{PREFIX}{path}{GAMMA}"] = lam, gam
    if saved_bases:
        state |= {f"base_model.{name}": basis for name, basis in adapter.bases.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Specified to not save")
            # The skeleton of a model has no name.
            warnings.filterwarnings("ignore", message=".*base_model_name_or_path. was renamed")
            changes: dict[str, Any] = {k: v for k, v in narrowed.items() if k in known}
            config = dataclasses.replace(adapter.config, **changes)
            model = peft.get_peft_model(root, config)
            result = peft.set_peft_model_state_dict(model, state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error) + "".join(str(error).splitlines()[1:2])
        raise CliError(f"{adapter.file} does not fit its model: {reason}") from error
    if result.unexpected_keys:
        raise CliError(f"{adapter.file} holds {result.unexpected_keys[0]}, unexpected")
    return model.eval()


def adapted_layers(model: peft.PeftModel) -> dict[str, AcceleratedLinear]:
    """The layers of a skeleton by their path in the base model."""
    root = model.base_model.model
    return {
        path: layer for path, layer in root.named_modules() if isinstance(layer, AcceleratedLinear)
    }


def _weightless(shape: Shape) -> nn.Linear:
    linear = nn.Linear(shape.in_features, shape.out_features, bias=False, device="meta")
    zero = torch.zeros((), dtype=shape.dtype)
    weight = zero.expand(shape.out_features, shape.in_features)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
