"""Checks of the frozen base layer; turns off fast paths of torch that would skip the adapter."""

import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import is_lazy

from ..ops.registration import autocast_is_on
from ..ranks import is_dtensor

_NOT_CUT = (
    "tensor parallelism is not supported beside adapters; DDP, DeepSpeed ZeRO and FSDP2 are, by "
    "fully_shard after the adapters have been added"
)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer that stores its weight as (in, out)."""
    # If transformers is not imported, nothing can be its Conv1D.
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and isinstance(module, utils.Conv1D)


def check_base_layer(module: Any, argument: str) -> None:
    """Raises, naming `argument`, unless it is an nn.Linear or Conv1D with a whole weight."""
    if hasattr(module, "update_layer"):
        raise TypeError(
            f"{argument} is adapted already ({type(module).__name__}); its model's add_adapter "
            "adds another"
        )
    if not (isinstance(module, nn.Linear) or is_conv1d(module)) or is_lazy(module.weight):
        given = type(module)
        raise TypeError(
            f"{argument} must be an nn.Linear or a transformers Conv1D with a weight, got "
            f"{given.__module__}.{given.__qualname__}"
        )
    check_whole(module.weight, argument)


def check_whole(weight: object, argument: str) -> None:
    """Raises ValueError, naming `argument`, if its weight is spread over ranks already."""
    if is_dtensor(weight):
        raise ValueError(f"{argument} has a weight placed {weight.placements}: {_NOT_CUT}")


def check_no_plan(model: nn.Module, name: str, argument: str) -> None:
    """Raises ValueError if transformers has cut module `name` over ranks by a plan of its own."""
    plan = getattr(model, "tp_plan", None) or {}
    style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
    if style is not None and (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(f"{argument} is cut over ranks ({style!r} in tp_plan): {_NOT_CUT}")


def check_is_called(model: nn.Module, name: str, argument: str) -> None:
    """Raises ValueError, naming `argument`, if torch would not call what replaces module `name`."""
    above, _, last = name.rpartition(".")
    if not name:
        why = "the model is the layer itself, which cannot be replaced in place"
    elif last == "_orig_mod":
        why = "torch.compile keeps calling what it was given; compile the layer afterwards"
    elif isinstance(model.get_submodule(above), nn.MultiheadAttention):
        why = "nn.MultiheadAttention reads its weight and never calls it"
    else:
        return
    raise ValueError(f"{argument} would not be adapted: {why}")


def refuse_cut(base_layer: nn.Module) -> None:
    """Raises RuntimeError if forward sees only this rank's part of the weight, which FSDP2 makes
    whole before it calls the module that it has sharded."""
    weight = getattr(base_layer, "weight", None)
    if is_dtensor(weight):
        from torch.distributed.fsdp import FSDPModule

        cut = any(placement.is_shard() for placement in weight.placements)
        if cut and not isinstance(base_layer, FSDPModule):
            raise RuntimeError(
                f"base_layer ({base_layer}) has a weight placed {weight.placements} in forward: "
                f"{_NOT_CUT}"
            )


def features(layer: Any) -> tuple[int, int]:  # of quantized layers, too
    """(in_features, out_features) of an nn.Linear or a Conv1D."""
    return (layer.nx, layer.nf) if is_conv1d(layer) else (layer.in_features, layer.out_features)


def plain_operands(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias if ``module(x)`` is ``F.linear(x, weight, bias)`` and nothing else.

    A subclass, a hook, a replaced forward (accelerate's offloading), a quantized or distributed
    weight or one on another device needs the module's own call.
    """
    if (
        type(module) is not nn.Linear
        or "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    ):
        return None
    weight = module.weight
    # While torch.export traces, parameters are FakeTensors, which have a fake_mode.
    plain = type(weight) in (nn.Parameter, Tensor) or hasattr(weight, "fake_mode")
    if not plain or x.device != weight.device:
        return None
    if x.dtype is not weight.dtype:
        # An error unless autocast casts both; it does not cast float64.
        casts = autocast_is_on(x.device.type)
        if not casts or torch.float64 in (x.dtype, weight.dtype):
            return None
    return weight, module.bias


def do_nothing(*_) -> None:
    pass


def disable_nested_tensors(model: nn.Module, name: str) -> None:
    """Keeps an nn.TransformerEncoder around module `name` from nested tensors in eval mode, which
    only its fused kernel takes."""
    for child in name.split("."):
        if isinstance(model, nn.TransformerEncoder):
            model.use_nested_tensor = False
        model = getattr(model, child)
