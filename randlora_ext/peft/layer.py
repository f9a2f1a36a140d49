"""PEFT's RandLoRA layers with forward and delta weight on the compiled kernels."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.randlora.layer import Linear
from torch import Tensor, nn

from ..basis import TernaryBasis
from ..nn.base_layer import can_fuse
from ..ops import cuda_library
from ..ops import functional as kernels
from ..ops.dtensor import full_tensor, is_dtensor, laid_out_like
from .bases import BASES, PackedBases

STOCK_QUANTIZED = "peft.tuners.randlora.bnb"  # imports bitsandbytes


_Layer: Any = object  # PEFT's layer class, before which this is mixed in


class Accelerated(_Layer):
    """Computes what a RandLoRA layer of PEFT computes, by ``torch.ops.randlora``.

    Mixed in before PEFT's layer class, which keeps saving, adding, switching and everything else.
    Where the bases are not ternary (PEFT's default, uniform ones) lambda * A * gamma is made by our
    kernel and multiplied by torch's GEMMs; one warning per model says so.
    """

    def __setattr__(self, name: str, value) -> None:
        # Registered as a submodule, the bases would be listed, moved and saved once per layer.
        if name in BASES and isinstance(value, PackedBases):
            self._modules.pop(name, None)
            # inject_adapter_in_model comes with new dictionaries for an added adapter.
            for adapter, basis in self.__dict__.get(name, {}).items():
                if adapter not in value:
                    value[adapter] = basis
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Also the bases: by it PEFT tells which entries of a state dict are an adapter's."""
        yield from super().named_children()
        yield from ((name, self.__dict__[name]) for name in BASES if name in self.__dict__)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in BASES:  # nothing where the tuner, or another layer, has written them
            self.__dict__[name]._save_to_state_dict(destination, f"{prefix}{name}.", keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        # A file of inject_adapter_in_model, ours or stock PEFT's, holds bases under the layers;
        # where there is a tuner it has taken them out (`AcceleratedRandLoraModel`).
        for name in BASES:
            own = f"{prefix}{name}."
            if any(key.startswith(own) for key in state_dict):
                unexpected[:] = [key for key in unexpected if not key.startswith(own)]
                bases = self.__dict__[name]
                bases._load_from_state_dict(
                    state_dict, own, metadata, strict, [], unexpected, errors
                )

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.randlora_lambda]
        if self.disable_adapters or self.merged or not names:  # the base alone; PEFT's unmerging
            return super().forward(x, *args, **kwargs)
        base, dtype = self.base_layer, x.dtype
        plain = not args and not kwargs and len(names) == 1 and not self._drops(names[0])
        if plain and can_fuse(base, x):
            basis, _ = self.basis_of(names[0], x.device)
            if basis is not None:
                return self._part(names[0], x, base.weight, base.bias, basis).to(dtype)
        result = base(x, *args, **kwargs)
        for name in names:
            x = x.to(self._compute_dtype(name, x.device))
            result = result + self._adapter(name, self.randlora_dropout[name](x))
        return result.to(dtype)

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args, **kwargs) -> Tensor:
        """Row b of the batch through adapter ``adapter_names[b]``; "__base__" means none."""
        if len(adapter_names) != len(x):
            raise ValueError(
                f"adapter_names must have one name per input, got {len(adapter_names)} for {len(x)}"
            )
        if self.merged:
            raise ValueError("adapter_names needs unmerged adapters; call unmerge_adapter() first")
        result = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name not in self.randlora_lambda:
                continue
            rows = [row for row, other in enumerate(adapter_names) if other == name]
            at = torch.tensor(rows, device=x.device)
            part = x[at].to(self._compute_dtype(name, x.device))
            result = result.index_add(0, at, self._adapter(name, part).to(result.dtype))
        return result

    def _adapter(self, name: str, x: Tensor) -> Tensor:
        """The adapter's part alone."""
        basis, reason = self.basis_of(name, x.device)
        if basis is not None:
            return self._part(name, x, None, None, basis)
        self.randlora_A.tell_once(reason)
        first, second = self.get_scaled_bases(name, device=x.device)
        return F.linear(F.linear(x, first), second) * self.scaling[name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's; TypeError for ``safe_merge`` of a layer that FSDP2 has sharded."""
        if safe_merge and is_dtensor(self.get_base_layer().weight):
            raise TypeError(
                "safe_merge cannot merge a layer that FSDP2 has sharded: PEFT then assigns to the "
                "weight's .data, which leaves a DTensor as it was; merge without safe_merge"
            )
        super().merge(safe_merge, adapter_names)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """As PEFT's, differentiable, in float32 where CPU bases are 16-bit. No dense A' is made.

        Where FSDP2 has sharded the layer a DTensor placed as its weight; all ranks must call.
        """
        device = self.randlora_lambda[adapter].device
        basis, reason = self.basis_of(adapter, device)
        if basis is None:
            self.randlora_A.tell_once(reason)
            first, second = self.get_scaled_bases(adapter)
            delta = second @ first * self.scaling[adapter]
        else:
            dtype = self._compute_dtype(adapter, device)
            lam = full_tensor(self.randlora_lambda[adapter]).to(dtype)
            gam = full_tensor(self.randlora_gamma[adapter]).to(dtype)
            delta = kernels.delta_weight(basis, lam, gam, self.scaling[adapter])
        delta = delta.T if self.fan_in_fan_out else delta
        return laid_out_like(delta, self.get_base_layer().weight)

    def get_scaled_bases(
        self, adapter: str, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """PEFT's dense factors in the order in which x meets them: (A', B) or (B^T, A'^T)."""
        A, B = self.randlora_A[adapter], self.randlora_B[adapter]
        lam, gam = self.randlora_lambda[adapter], self.randlora_gamma[adapter]
        device, dtype = device or B.device, self._compute_dtype(adapter, device or B.device)
        # The adapter's own number of bases; PEFT keeps one a layer, that of the adapter added last.
        (n, d), D = gam.shape, max(self.in_features, self.out_features)
        A = A[:, 0, :d].to(device, dtype)
        B = B[:D, :n].flatten(1).to(device, self._base_dtype(adapter, device))
        scaled = kernels.scaled_basis(A, lam.to(device), gam.to(device))
        return (scaled, B) if d == self.in_features else (B.T, scaled.T)

    def basis_of(self, adapter: str, device: torch.device) -> tuple[TernaryBasis | None, str]:
        """(the adapter's packed basis, ""), or (None, why there is none)."""
        if not has_kernels(device.type):
            return None, f"there are no randlora_ext kernels for device type {device.type!r}"
        r = self.randlora_lambda[adapter].shape[0]
        sizes = self.in_features, self.out_features, r
        return self.randlora_A.layer_basis(self.randlora_B, adapter, *sizes)

    def _part(
        self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, basis: TernaryBasis
    ) -> Tensor:
        lam = self.randlora_lambda[name].to(x.device)
        gam = self.randlora_gamma[name].to(x.device)
        return kernels.linear(x, weight, bias, basis, lam, gam, self.scaling[name])

    def _base_dtype(self, name: str, device: torch.device) -> torch.dtype:
        dtype = self.randlora_B.dtype_of(name)
        # PEFT computes in float32 where a CPU would be slow in 16 bits.
        half = device.type == "cpu" and dtype in (torch.float16, torch.bfloat16)
        return torch.float32 if half else dtype

    def _compute_dtype(self, name: str, device: torch.device) -> torch.dtype:
        """The dtype to which PEFT casts x before the adapter: that of its scaled A."""
        dtype = self._base_dtype(name, device)
        if dtype is not self.randlora_B.dtype_of(name):
            return dtype
        for diagonals in (self.randlora_lambda, self.randlora_gamma):
            dtype = torch.promote_types(dtype, diagonals[name].dtype)
        return dtype

    def _drops(self, name: str) -> bool:
        dropout = self.randlora_dropout[name]
        return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


class AcceleratedLinear(Accelerated, Linear):
    """`peft.tuners.randlora.layer.Linear` on the compiled kernels: nn.Linear and Conv1D."""


def accelerated_class(stock: type) -> type | None:
    """The accelerated class of a RandLoRA layer class of PEFT; None for another class."""
    if stock is Linear:
        return AcceleratedLinear
    if stock.__module__ == STOCK_QUANTIZED:
        from . import quantized  # imports bitsandbytes, as stock has already

        return quantized.accelerated_class(stock)
    return None


def update_quantized(layer: Accelerated, name: str, A: PackedBases, B: PackedBases, config) -> None:
    """Adds adapter `name` to a layer, in whichever way this version of PEFT wants its options."""
    if "config" in inspect.signature(layer.update_layer).parameters:  # since 0.20
        layer.update_layer(name, A, B, config.r, config=config)
    else:
        options = (config.randlora_alpha, config.randlora_dropout, config.init_weights)
        layer.update_layer(name, A, B, config.r, *options)


def has_kernels(device_type: str) -> bool:
    """Whether ``torch.ops.randlora`` computes on that device type here."""
    return device_type == "cpu" or (device_type == "cuda" and cuda_library.available())
