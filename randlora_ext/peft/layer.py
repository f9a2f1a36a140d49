"""PEFT's RandLoRA layer with forward and delta weight on the compiled kernels."""

import functools
import warnings

import torch
from peft.tuners.randlora.layer import Linear
from torch import Tensor, nn

from .. import functional
from ..base_layer import can_fuse
from ..basis import TernaryBasis
from .bases import ternary_basis


class AcceleratedLinear(Linear):
    """`peft.tuners.randlora.layer.Linear`, computing the same numbers by ``torch.ops.randlora``.

    Where a base is not ternary, or the device has no kernels, the layer computes as PEFT does, and
    says so in one warning per model. Merging, saving and everything else are PEFT's.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        names = [name for name in self.active_adapters if name in self.randlora_lambda]
        # The base layer alone, or PEFT's unmerging; then, what our kernels do not cover.
        if self.disable_adapters or self.merged or not names:
            return super().forward(x, *args, **kwargs)
        found = [self.basis_of(name, x.device) for name in names]
        reasons = {reason for _, reason in found if reason}
        if reasons:
            self._tell(reasons.pop())
            return super().forward(x, *args, **kwargs)

        base, dtype = self.base_layer, x.dtype
        plain = not args and not kwargs and len(names) == 1 and not self._drops(names[0])
        if plain and can_fuse(base, x):
            return self._part(names[0], x, base.weight, base.bias, found[0][0]).to(dtype)
        result = base(x, *args, **kwargs)
        for name, (basis, _) in zip(names, found, strict=True):
            x = x.to(self._compute_dtype(name, x.device))
            dropped = self.randlora_dropout[name](x)
            result = result + self._part(name, dropped, None, None, basis)
        return result.to(dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """As PEFT's, differentiable, in float32 where CPU bases are 16-bit. No dense A' is made."""
        device = self.randlora_B[adapter].device
        basis, reason = self.basis_of(adapter, device)
        if basis is None:
            self._tell(reason)
            return super().get_delta_weight(adapter)
        dtype = self._compute_dtype(adapter, device)
        lam = self.randlora_lambda[adapter].to(device, dtype)
        gam = self.randlora_gamma[adapter].to(device, dtype)
        delta = functional.delta_weight(basis, lam, gam, self.scaling[adapter])
        return delta.T if self.fan_in_fan_out else delta

    def get_scaled_bases(
        self, adapter: str, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        # PEFT keeps one num_bases a layer, that of the adapter added last.
        self.num_bases = self.randlora_gamma[adapter].shape[0]
        return super().get_scaled_bases(adapter, device)

    @torch.compiler.disable  # bookkeeping, not computation: torch.compile need not look inside
    def basis_of(self, adapter: str, device: torch.device) -> tuple[TernaryBasis | None, str]:
        """(the adapter's packed basis, ""), or (None, why PEFT's own code runs)."""
        if not has_kernels(device.type):
            return None, f"there are no randlora_ext kernels for device type {device.type!r}"
        r = self.randlora_lambda[adapter].shape[0]
        A, B = self.randlora_A[adapter], self.randlora_B[adapter]
        return ternary_basis(A, B, self.in_features, self.out_features, r)

    def _part(
        self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, basis: TernaryBasis
    ) -> Tensor:
        lam = self.randlora_lambda[name].to(x.device)
        gam = self.randlora_gamma[name].to(x.device)
        return functional.linear(x, weight, bias, basis, lam, gam, self.scaling[name])

    def _compute_dtype(self, name: str, device: torch.device) -> torch.dtype:
        """The dtype to which PEFT casts x before the adapter: that of its scaled A."""
        base, *diagonals = (
            t[name].dtype for t in (self.randlora_B, self.randlora_lambda, self.randlora_gamma)
        )
        if device.type == "cpu" and base in (torch.float16, torch.bfloat16):
            return torch.float32
        for dtype in diagonals:
            base = torch.promote_types(base, dtype)
        return base

    def _drops(self, name: str) -> bool:
        dropout = self.randlora_dropout[name]
        return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0

    def _tell(self, reason: str) -> None:
        # All layers of a model hold the same BufferDict, so the mark on it is the model's.
        if not self.randlora_A.__dict__.setdefault("_randlora_ext_told", False):
            self.randlora_A._randlora_ext_told = True
            warnings.warn(
                f"RandLoRA layers of this model run on PEFT's own code: {reason}. The kernels of "
                "randlora_ext need ternary bases (sparse=True, very_sparse=True or a density).",
                stacklevel=3,
            )


@functools.cache
def has_kernels(device_type: str) -> bool:
    """Whether ``torch.ops.randlora`` computes on that device type."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        "randlora::linear", key
    )
