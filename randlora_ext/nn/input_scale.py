"""`InputScales`: what the adapters of a layer multiply their inputs by."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class InputScales(nn.Module):
    """By the adapter's name a vector (in_features,) or, of experts, (experts, in_features): ones
    until the adapter is calibrated.

    They are buffers, so state dicts hold them, and whatever moves, copies, sends or loads the
    tensors of a model takes them along. They stay float32 whatever ``.to(dtype)`` casts: a vector
    is a few kilobytes, and rounding it would change what a calibrated adapter computes.
    """

    def __getitem__(self, adapter: str) -> Tensor:
        return self._buffers[adapter]  # type: ignore[return-value]

    def __setitem__(self, adapter: str, input_scale: Tensor) -> None:
        self.register_buffer(adapter, input_scale)

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
