"""PEFT's RandLoRA layers over bitsandbytes: 8 and 4 bits.

Imported when such a layer exists, since it imports bitsandbytes.
"""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.randlora import bnb as stock
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor

from .layer import AcceleratedLayer, warn_of_rounding


class _QuantizedLayer(AcceleratedLayer):
    """Merges by quantizing the sum of the dequantized weight and B A' again.

    Unmerging puts the old quantized weight back.

    Stock PEFT multiplies A' B, another matrix. In 4 bits it also gives ``Params4bit`` the old
    weight's flag that it is quantized already, which newer bitsandbytes obeys.
    """

    def _dense_weight(self) -> Tensor:
        base = self.get_base_layer()
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            base.state_dict()  # puts back what bitsandbytes reordered for inference on the CPU
        return dequantize_bnb_weight(base.weight, getattr(base, "state", None))

    def _writer(self, total: Tensor) -> Callable[[], None]:
        base = self.get_base_layer()
        warn_of_rounding(base)
        return _assign(base, _requantized(total, base.weight, total.dtype))

    def _keep(self, keep_weight: str) -> tuple:
        """The quantized weight itself, without a copy: the sum will be another tensor."""
        base = self.get_base_layer()
        state = getattr(base, "state", None)  # of 8 bits, where the first call puts the scales
        return base.weight, None if state is None else state.SCB

    def _restorer(self, kept: Any) -> Callable[[], None]:
        base, (weight, scales) = self.get_base_layer(), kept
        if scales is not None:
            kind = type(weight)
            fp16 = weight.has_fp16_weights
            weight = kind(weight.data, requires_grad=False, has_fp16_weights=fp16, CB=weight.data)
            weight.SCB = scales
        return _assign(base, weight.to(base.weight.device))


def _assign(base, weight) -> Callable[[], None]:
    def write() -> None:
        base.weight = weight
        if hasattr(base, "state"):
            base.state.reset_grads()

    return write


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
