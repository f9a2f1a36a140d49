"""PEFT's RandLoRA layers over bitsandbytes: 8 and 4 bits.

Imported when such a layer exists, since it imports bitsandbytes.
"""

import bitsandbytes as bnb
import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.randlora import bnb as stock
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor

from ..nn.merging import complete
from .layer import AcceleratedLayer
from .merging import refuse_non_finite, warn_of_rounding


class _QuantizedLayer(AcceleratedLayer):
    """Merges by quantizing the sum of the dequantized weight and B A' again.

    Stock PEFT multiplies A' B, another matrix. In 4 bits it also gives ``Params4bit`` the old
    weight's flag that it is quantized already, which newer bitsandbytes obeys.
    """

    @torch.no_grad()
    def _add_to_weight(self, delta: Tensor, merged: list[str], blamed: str | None = None) -> None:
        base = self.get_base_layer()
        warn_of_rounding(base)
        state = getattr(base, "state", None)  # of 8 bits
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            base.state_dict()  # puts back what bitsandbytes reordered for inference on the CPU
        dense = dequantize_bnb_weight(base.weight, state)
        total = dense.to(delta.dtype) + delta
        refuse_non_finite(total, blamed)
        new = _requantized(total, base.weight, dense.dtype)

        def write() -> None:
            base.weight = new
            if state is not None:
                state.reset_grads()
            self.merged_adapters = merged

        complete(write)


def _requantized(total: Tensor, old, dtype: torch.dtype):
    """`total` in the format of the quantized parameter `old`."""
    if isinstance(old, bnb.nn.Int8Params):
        fp16 = old.has_fp16_weights
        new = bnb.nn.Int8Params(total.to("cpu"), requires_grad=False, has_fp16_weights=fp16)
    else:
        new = bnb.nn.Params4bit(
            total.to(dtype),
            requires_grad=False,
            compress_statistics=old.compress_statistics,
            blocksize=old.blocksize,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=old.module,
        )
    return new.to(old.device)


class AcceleratedLinear8bitLt(_QuantizedLayer, stock.Linear8bitLt):
    """`peft.tuners.randlora.bnb.Linear8bitLt` on the compiled kernels."""


if is_bnb_4bit_available():

    class AcceleratedLinear4bit(_QuantizedLayer, stock.Linear4bit):
        """`peft.tuners.randlora.bnb.Linear4bit` on the compiled kernels."""


def accelerated_class(layer: type) -> type | None:
    if layer is stock.Linear8bitLt:
        return AcceleratedLinear8bitLt
    if is_bnb_4bit_available() and layer is stock.Linear4bit:
        return AcceleratedLinear4bit
    return None
