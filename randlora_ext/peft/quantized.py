"""PEFT's RandLoRA layers over bitsandbytes: 8 and 4 bits.

Imported where such a layer exists, since it imports bitsandbytes.
"""

import warnings

import bitsandbytes as bnb
import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.randlora import bnb as stock
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from .layer import Accelerated


class AcceleratedLinear8bitLt(Accelerated, stock.Linear8bitLt):
    """PEFT's merges A' B where B A' is meant; it asks our ``get_delta_weight``."""


if is_bnb_4bit_available():

    class AcceleratedLinear4bit(Accelerated, stock.Linear4bit):
        """Merges by quantizing the sum again.

        PEFT's multiplies in the wrong order as well, and hands the sum to ``Params4bit`` with the
        old weight's mark that it is quantized already, which newer versions of bitsandbytes obey.
        """

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            for name in check_adapters_to_merge(self, adapter_names) or []:
                if name not in self.randlora_lambda:
                    continue
                warnings.warn("Merging into a 4-bit linear rounds the sum to 4 bits.", stacklevel=2)
                self._add(self.get_delta_weight(name), name if safe_merge else None)
                self.merged_adapters.append(name)

        def unmerge(self) -> None:
            while self.merged_adapters:
                name = self.merged_adapters.pop()
                if name in self.randlora_lambda:
                    self._add(-self.get_delta_weight(name))

        @torch.no_grad()
        def _add(self, delta: Tensor, checked: str | None = None) -> None:
            """Weight + delta, rounded to 4 bits; where `checked`, only if the sum is finite."""
            base = self.get_base_layer()
            if getattr(base.weight.quant_state, "packing_format_for_cpu", False):
                base.state_dict()  # puts back what bitsandbytes reordered for inference on the CPU
            weight = base.weight
            dense = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            total = (dense.to(delta.dtype) + delta).to(dense.dtype)
            if checked is not None and not torch.isfinite(total).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {checked} seems to be broken"
                )
            base.weight = bnb.nn.Params4bit(
                total,
                requires_grad=False,
                compress_statistics=weight.compress_statistics,
                blocksize=weight.blocksize,
                quant_type=weight.quant_type,
                quant_storage=weight.quant_storage,
                module=weight.module,
            ).to(weight.device)


def accelerated_class(layer: type) -> type | None:
    if layer is stock.Linear8bitLt:
        return AcceleratedLinear8bitLt
    if is_bnb_4bit_available() and layer is stock.Linear4bit:
        return AcceleratedLinear4bit
    return None
