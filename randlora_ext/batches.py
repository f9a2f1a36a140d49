"""Batches of a model's arguments, which each rank has of its own."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def moved_to(model: nn.Module, batch: Any) -> Any:
    """The batch, a tensor, or a mapping, list or tuple that holds some, on the model's device: that
    of its first parameter.

    Parameters on the meta device are passed over. They are those that accelerate has offloaded, and
    its hooks move the inputs of their modules.
    """
    devices = (parameter.device for parameter in model.parameters())
    device = next((device for device in devices if device.type != "meta"), None)
    return batch if device is None else _moved(batch, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(each, device) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(each, device) for each in value)
    return value


def of_all_ranks(value: Any) -> list[Any]:
    """The values of all ranks, in their order; of one process its own."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
