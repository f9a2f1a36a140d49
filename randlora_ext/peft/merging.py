"""Merging PEFT's RandLoRA layers into their weight, and unmerging them."""

import warnings

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..nn.merging import KeepsWeight


class MergeableLayer(KeepsWeight):
    """``merge`` of `AcceleratedLayer`; `KeepsWeight` has ``unmerge``, for PEFT's signature, too."""

    keep_weight = "host"  # of all layers; `enable` sets it

    @torch.no_grad()
    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        keep_weight: str | None = None,
    ) -> None:
        """As PEFT's, but all adapters are added before the sum is rounded, and W is kept.

        Args:
            keep_weight: "host", "device" or "nothing", as for `RandLoraLinear.merge`; None means
                what `enable` was told. Quantized weights are kept on their own device.
        """
        chosen = check_adapters_to_merge(self, adapter_names) or []
        if names := [name for name in dict.fromkeys(chosen) if name in self.randlora_lambda]:
            self._merge(names, safe_merge, keep_weight or self.keep_weight)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT puts in the layer's place; nothing is kept, because nothing can unmerge it."""
        if merge:
            self.merge(safe_merge, adapter_names, keep_weight="nothing")
        return self.get_base_layer()

    def _delta_to_merge(self, name: str) -> Tensor:
        return self.get_delta_weight(name)


def warn_of_rounding(base: nn.Module) -> None:
    warnings.warn(
        f"Merging or unmerging rounds the sum to that of {type(base).__name__} again, with "
        "rounding errors.",
        stacklevel=6,
    )
