"""RandLoRA layers over quantized bases: bitsandbytes, and HQQ, GPTQ and AWQ by PEFT's backends.

The base computes its own part. Merging quantizes the sum of the dequantized weight and dW again;
unmerging puts the old quantized weight back.
"""

import itertools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.randlora.layer import RandLoraLayer
from peft.tuners.randlora.model import RandLoraModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from ..nn.base_layer import force_module_call, is_conv1d
from .layer import AcceleratedLinear

try:
    from peft.utils.quantization_utils import resolve_quantization_backend
except ImportError:  # older PEFT, which refuses such bases

    def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> None:
        return None


def _warn_of_rounding(base: nn.Module) -> None:
    warnings.warn(
        f"Merging or unmerging rounds the sum to that of {type(base).__name__} again, with "
        "rounding errors.",
        stacklevel=6,
    )


# ---- bitsandbytes, whose layers are nn.Linear ----------------------------------------------------


def is_bitsandbytes(base: nn.Module) -> bool:
    bnb = sys.modules.get("bitsandbytes")  # without it nothing can be its layer
    return bnb is not None and isinstance(base, (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit))


class BitsAndBytesLinear(AcceleratedLinear):
    """`AcceleratedLinear` over 8 or 4 bits of bitsandbytes.

    Stock PEFT, which has a class for each, merges A' B, another matrix. In 4 bits it also gives
    ``Params4bit`` the old weight's flag that it is quantized already, which newer bitsandbytes
    obeys.
    """

    def _dense_weight(self) -> Tensor:
        base = self.get_base_layer()
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            base.state_dict()  # puts back what bitsandbytes reordered for inference on the CPU
        return dequantize_bnb_weight(base.weight, getattr(base, "state", None))

    def _writer(self, total: Tensor) -> Callable[[], None]:
        base = self.get_base_layer()
        _warn_of_rounding(base)
        return _assign(base, _requantized(total, base.weight))

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


def _assign(base: Any, weight: Tensor) -> Callable[[], None]:
    def write() -> None:
        base.weight = weight
        if hasattr(base, "state"):
            base.state.reset_grads()

    return write


def _requantized(total: Tensor, old: Any) -> Tensor:
    """`total` in the format of the quantized parameter `old`."""
    from bitsandbytes.nn import Int8Params, Params4bit

    if isinstance(old, Int8Params):
        fp16 = old.has_fp16_weights
        new: Any = Int8Params(total.to("cpu"), requires_grad=False, has_fp16_weights=fp16)
    else:
        kept = "compress_statistics", "blocksize", "quant_type", "quant_storage", "module"
        options = {name: getattr(old, name) for name in kept}
        new = Params4bit(total, requires_grad=False, **options)
    return new.to(old.device)


# ---- layers that are not nn.Linear, which stock RandLoRA refuses ---------------------------------


class OtherQuantizedLinear(AcceleratedLinear):
    """`AcceleratedLinear` over a base without an ordinary weight."""

    quantization_backend: Any

    def _base_weight(self) -> Tensor:
        return _stand_in(self.get_base_layer())

    def _held_weight(self) -> None:
        return None

    def _dense_weight(self) -> Tensor:
        """Raises PEFT's TypeError if this kind of base cannot be merged."""
        return self.quantization_backend.get_base_weight(self.get_base_layer())

    def _writer(self, total: Tensor) -> Callable[[], None]:
        base: Any = self.get_base_layer()
        _warn_of_rounding(base)

        def write() -> None:
            self.quantization_backend.set_base_weight(self, total)
            self.get_base_layer().bias = base.bias  # PEFT does not copy it

        return write

    def _keep(self, keep_weight: str) -> tuple:
        """The base layer itself, without a copy: PEFT puts another one in its place."""
        return (self.base_layer,)

    def _restorer(self, kept: Any) -> Callable[[], None]:
        return lambda: setattr(self, "base_layer", kept[0])


def backend_of(base: nn.Module) -> Any:
    """PEFT's backend for a quantized layer that is not an nn.Linear; None for other modules."""
    # PEFT 0.20 fails on any other layer beside a newer torchao, so it is not asked needlessly.
    others = nn.Linear, RandLoraLayer, ModulesToSaveWrapper
    if isinstance(base, others) or is_conv1d(base) or not hasattr(base, "in_features"):
        return None
    return resolve_quantization_backend(base)


def _stand_in(base: Any) -> Tensor:
    """An empty tensor of the device and the dtype that a quantized layer computes with."""
    tensors = list(itertools.chain(base.parameters(), base.buffers()))
    floating = (t.dtype for t in tensors if t.is_floating_point())
    dtype = getattr(base, "compute_dtype", None) or next(floating, torch.float32)
    return torch.empty(0, dtype=dtype, device=tensors[0].device)


def wrap(backend: Any, config: Any, A: Any, B: Any, name: str, base: Any, **kwargs: Any) -> Any:
    """PEFT's layer around `base`, made from a linear layer of its sizes that takes no memory."""
    like = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    zero = _stand_in(base).new_zeros(())
    like.weight = nn.Parameter(zero.expand(base.out_features, base.in_features), False)
    layer = RandLoraModel._create_new_module(config, A, B, name, like, **kwargs)
    layer.base_layer = base
    layer.__class__ = OtherQuantizedLinear
    layer.quantization_backend = backend
    force_module_call(layer)
    return layer
