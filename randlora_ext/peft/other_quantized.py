"""RandLoRA layers over quantized bases that stock RandLoRA refuses: HQQ, GPTQ and AWQ.

The base computes its own part. PEFT's quantization backends recognize it, and merge if they can.
"""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.randlora.layer import RandLoraLayer
from peft.tuners.randlora.model import RandLoraModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..nn.base_layer import force_module_call, is_conv1d
from .layer import AcceleratedLinear, warn_of_rounding

try:
    from peft.utils.quantization_utils import resolve_quantization_backend
except ImportError:  # older PEFT, which refuses such bases

    def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> None:
        return None


class OtherQuantizedLinear(AcceleratedLinear):
    """`AcceleratedLinear` over a base without an ordinary weight."""

    quantization_backend: Any

    def _base_weight(self) -> Tensor:
        return stand_in(self.get_base_layer())

    def _dense_weight(self) -> Tensor:
        """Raises PEFT's TypeError if this kind of base cannot be merged."""
        return self.quantization_backend.get_base_weight(self.get_base_layer())

    def _writer(self, total: Tensor) -> Callable[[], None]:
        base: Any = self.get_base_layer()
        warn_of_rounding(base)

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


def stand_in(base: Any) -> Tensor:
    """An empty tensor of the device and the dtype that a quantized layer computes with."""
    tensors = list(itertools.chain(base.parameters(), base.buffers()))
    floating = (t.dtype for t in tensors if t.is_floating_point())
    dtype = getattr(base, "compute_dtype", None) or next(floating, torch.float32)
    return torch.empty(0, dtype=dtype, device=tensors[0].device)


def wrap(backend: Any, config: Any, A: Any, B: Any, name: str, base: Any, **kwargs: Any) -> Any:
    """PEFT's layer around `base`, made from a linear layer of its sizes that takes no memory."""
    like = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    zero = stand_in(base).new_zeros(())
    like.weight = nn.Parameter(zero.expand(base.out_features, base.in_features), False)
    layer = RandLoraModel._create_new_module(config, A, B, name, like, **kwargs)
    layer.base_layer = base
    layer.__class__ = OtherQuantizedLinear
    layer.quantization_backend = backend
    force_module_call(layer)
    return layer


def with_weight(base: nn.Module) -> Any:
    """A module whose weight tells PEFT the device when it replaces `base`."""
    return base if backend_of(base) is None else SimpleNamespace(weight=stand_in(base))
