"""`InputScales`: what the adapters of a layer multiply their inputs by."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class InputScales(nn.Module):
    """By the adapter's name a vector (in_features,) or, of experts, (experts, in_features): ones
    until the adapter is calibrated.

    They are buffers, so state dicts hold them, and whatever moves, copies, sends or loads the
    tensors of a model takes them along. They stay float32 whatever ``.to(dtype)`` casts: a vector
    is a few kilobytes, and rounding it would change what a calibrated adapter computes.
    """

    def reset(self, adapter: str, shape: tuple[int, ...], device: torch.device) -> None:
        """Ones for an adapter that is not calibrated."""
        self.register_buffer(adapter, torch.ones(shape, dtype=torch.float32, device=device))

    def __getitem__(self, adapter: str) -> Tensor:
        return self._buffers[adapter]  # type: ignore[return-value]

    def __delitem__(self, adapter: str) -> None:
        del self._buffers[adapter]

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def keys(self) -> Iterator[str]:
        return iter(self)

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' own loaders set tensors by their paths.
        if name in self.__dict__.get("_buffers", ()):
            problems = input_scale_misfits(name, value, self[name])
            if problems:
                raise ValueError("; ".join(problems))
            value = value.float()
        super().__setattr__(name, value)

    def move(self, adapter: str, device: torch.device) -> None:
        """Unless it has no numbers (meta device)."""
        if not self[adapter].is_meta:
            self._buffers[adapter] = self[adapter].to(device)

    def _apply(self, fn, recurse: bool = True) -> "InputScales":
        for adapter in self:
            input_scale = self[adapter]
            moved = fn(input_scale)
            if moved.dtype != torch.float32:
                moved = input_scale.to(moved.device)
            if input_scale.is_meta and not moved.is_meta:  # by `to_empty`, which leaves any numbers
                moved = torch.ones_like(moved)
            self._buffers[adapter] = moved
        return self

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        for adapter in self:  # load_state_dict(assign=True) takes the tensor of the state
            self._buffers[adapter] = self[adapter].float()


def tensor_misfits(key: str, saved: Any, own: Tensor) -> list[str]:
    """Why the entry `saved` of a state dict cannot replace `own`; empty if it can."""
    if not isinstance(saved, Tensor):
        return [f"{key} must be a tensor, got {type(saved).__name__}"]
    if saved.shape != own.shape:
        return [f"{key} is {tuple(saved.shape)}, and must be {tuple(own.shape)}"]
    if saved.is_floating_point() != own.is_floating_point():
        wanted = "floating point" if own.is_floating_point() else "an integer"
        return [f"{key} is {saved.dtype}, and must be {wanted}"]
    return []


def input_scale_misfits(key: str, saved: Any, own: Tensor) -> list[str]:
    """As `tensor_misfits`, of an input scale, whose numbers must be positive and finite."""
    problems = tensor_misfits(key, saved, own)
    if problems:
        return problems
    wrong = wrong_numbers(key, saved)
    return [wrong] if wrong else []


def wrong_numbers(key: str, input_scale: Tensor) -> str:
    """Why these cannot scale inputs; "" if they can."""
    if input_scale.is_meta:
        return f"{key} has no numbers (meta device)"
    numbers = input_scale.float()
    if not bool(((numbers > 0) & numbers.isfinite()).all()):
        return f"{key} must be positive and finite in every feature"
    return ""
