"""Merging PEFT's RandLoRA layers into their weight, and unmerging them."""

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..nn.merging import complete
from ..ops.dtensor import full_tensor

_Layer: Any = object  # mypy: this is mixed in before PEFT's layer class


class MergeableLayer(_Layer):
    """``merge`` and ``unmerge`` of `AcceleratedLayer`."""

    merged_adapters: list[str]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's; weight and `merged_adapters` agree after Ctrl-C, too."""
        for name in check_adapters_to_merge(self, adapter_names) or []:
            if name in self.randlora_lambda:
                blamed = name if safe_merge else None
                self._add_to_weight(
                    self.get_delta_weight(name), [*self.merged_adapters, name], blamed
                )

    def unmerge(self) -> None:
        """As PEFT's; weight and `merged_adapters` agree after Ctrl-C, too."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            *rest, name = self.merged_adapters
            if name in self.randlora_lambda:
                self._add_to_weight(-self.get_delta_weight(name), rest)
            else:
                self.merged_adapters = rest

    @torch.no_grad()
    def _add_to_weight(self, delta: Tensor, merged: list[str], blamed: str | None = None) -> None:
        """Adds to the base weight, which then has `merged` in it.

        Args:
            blamed: the adapter that an error names if the sum is not finite; None does not look.
        """
        weight = self.get_base_layer().weight
        total = weight + delta
        refuse_non_finite(total, blamed)

        def write() -> None:
            weight.copy_(total)
            self.merged_adapters = merged

        complete(write)


def warn_of_rounding(base: nn.Module) -> None:
    warnings.warn(
        f"Merging or unmerging rounds the sum to that of {type(base).__name__} again, with "
        "rounding errors.",
        stacklevel=4,
    )


def refuse_non_finite(total: Tensor, blamed: str | None) -> None:
    """PEFT's error of ``safe_merge``; None does not look."""
    if blamed is not None and not bool(full_tensor(torch.isfinite(total).all())):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {blamed} seems to be broken"
        )
