"""Batches of a model's arguments."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def check_batches(batches: Any) -> None:
    """Raises TypeError unless they can be several batches."""
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        got = "one tensor or mapping" if isinstance(batches, (Tensor, Mapping)) else repr(batches)
        raise TypeError(f"batches must be several, such as [batch], got {got}")


def device_of(model: nn.Module) -> torch.device:
    """That of its first parameter.

    Parameters on the meta device are passed over. They are those that accelerate has offloaded, and
    its hooks move the inputs of their modules.
    """
    devices = (parameter.device for parameter in model.parameters())
    return next((each for each in devices if each.type != "meta"), torch.device("cpu"))


def moved_to(model: nn.Module, batch: Any) -> Any:
    """The batch, a tensor, or a mapping, list or tuple that holds some, on the model's device."""
    return _moved(batch, device_of(model))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(each, device) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(each, device) for each in value)
    return value
