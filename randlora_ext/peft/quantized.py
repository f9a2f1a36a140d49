"""RandLoRA layers over quantized bases: bitsandbytes, HQQ, GPTQ, AWQ, by PEFT's backends.

What a layer is decides, not which class of PEFT stands over it. The base computes its own part.
Merging quantizes the sum of the dequantized weight and dW again; unmerging puts the old base layer
back.
"""

import copy
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.randlora.layer import RandLoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from ..checks import warn_user
from ..nn.adapted_layer import AdaptedLayer
from ..nn.base_layer import is_conv1d
from .layer import AcceleratedLinear


def backend_of(base: nn.Module) -> Any:
    """PEFT's backend for a quantized layer; None for others, also an nn.Linear of torchao."""
    bnb = sys.modules.get("bitsandbytes")  # without it nothing can be its layer
    if bnb is not None and isinstance(base, (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)):
        return resolve_quantization_backend(base)
    known = nn.Linear, AdaptedLayer, RandLoraLayer, ModulesToSaveWrapper
    if isinstance(base, known) or is_conv1d(base):
        return None
    return resolve_quantization_backend(base) if hasattr(base, "in_features") else None


class QuantizedLinear(AcceleratedLinear):
    """`AcceleratedLinear` over a quantized base; PEFT's own classes merge A' B, not B A'."""

    quantization_backend: Any

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self.quantization_backend = backend_of(base_layer)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple:
        if isinstance(base_layer, nn.Linear):
            return super()._get_base_layer_device_and_dtype(base_layer)
        like = _stand_in(base_layer)  # PEFT knows the weights of some
        return like.device, like.dtype

    def _base_weight(self) -> Tensor:
        return _stand_in(self.get_base_layer())

    def _held_weight(self) -> None:
        return None

    def _dense_weight(self) -> Tensor:
        base = self.get_base_layer()
        state = getattr(getattr(base, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            base.state_dict()  # puts back what bitsandbytes reordered for inference on the CPU
        return self.quantization_backend.get_base_weight(base)

    def _writer(self, total: Tensor) -> Callable[[], None]:
        base: Any = self.get_base_layer()
        warn_user(
            f"Merging rounds the sum to that of {type(base).__name__} again, with rounding errors."
        )
        # PEFT's backends change or replace the base layer of the layer that they get.
        like: Any = copy.copy(self)
        like._modules = self._modules.copy()
        like.base_layer = copy.deepcopy(base)
        weight: Any = getattr(like.base_layer, "weight", None)
        if hasattr(weight, "module"):  # of 4 bits, where quantizing writes its scales
            weight.module = like.base_layer
        self.quantization_backend.set_base_weight(like, total)
        like.base_layer.bias = base.bias  # which not all of them copy
        return lambda: setattr(self, "base_layer", like.base_layer)

    def _keep(self) -> nn.Module:
        """The base layer itself, without a copy: the sum is in another one."""
        return self.base_layer

    def _restorer(self, kept: Any) -> Callable[[], None]:
        device = self._base_weight().device
        if _stand_in(kept).device != device:
            kept = kept.to(device)
        return lambda: setattr(self, "base_layer", kept)


def _stand_in(base: Any) -> Tensor:
    """An empty tensor of the device and the dtype that a quantized layer computes with."""
    tensors = list(itertools.chain(base.parameters(), base.buffers()))
    floating = (t.dtype for t in tensors if t.is_floating_point())
    dtype = getattr(base, "compute_dtype", None) or next(floating, torch.float32)
    return torch.empty(0, dtype=dtype, device=tensors[0].device)
