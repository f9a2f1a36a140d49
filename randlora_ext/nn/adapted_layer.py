"""What a layer with RandLoRA adapters computes: `RandLoraLinear` and PEFT's layers alike."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..basis import Basis
from ..basis.description import check_kind
from ..checks import check_model
from ..ops import functional
from ..ranks import full_tensor, laid_out_like
from .base_layer import plain_weight, refuse_cut
from .merging import KeepsWeight
from .state_dict import DIAGONALS, INPUT_SCALE, no_scale, refuse_misfit


class AdaptedLayer(KeepsWeight):
    """``base_layer(x) + sum over adapters of scaling * dropout(x) dW^T``, dW itself, and merging.

    Classes that mix it in make the adapters, choose the active ones, and say which basis and which
    dtype each has. ``scaling``, ``randlora_lambda``, ``randlora_gamma`` and ``randlora_dropout``
    hold the adapters by name. So does ``input_scales``, for those that `calibrate` has given one: a
    plain dictionary, whose tensors no `.to` casts and no engine spreads over ranks.
    """

    experts: tuple[int, ...] = ()  # how many, if the weight is a stack
    bases: dict[str, Basis]
    input_scales: dict[str, Tensor]

    def basis_of(self, adapter: str, device: torch.device) -> Basis:
        """The basis by which the adapter multiplies on that device."""
        return self.bases[adapter]

    def _dtype_of(self, adapter: str) -> torch.dtype:
        """The dtype of dW and of its factors."""
        return self.randlora_lambda[adapter].dtype

    def _diagonals(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Lambda and gamma, gathered if FSDP2 has sharded them."""
        modules = self._modules
        lam = getattr(modules["randlora_lambda"], name)
        gam = getattr(modules["randlora_gamma"], name)
        if type(lam) is type(gam) is nn.Parameter and lam.device == device == gam.device:
            return lam, gam
        return full_tensor(lam).to(device), full_tensor(gam).to(device)

    def get_base_layer(self) -> Any:
        """The frozen layer, or the module that has the parameter. Source: PEFT's method."""
        base = self.base_layer
        return base.get_base_layer() if isinstance(base, AdaptedLayer) else base

    def _base_weight(self) -> Tensor:
        """Has the dtype, device and layout in which the base layer computes."""
        return self.get_base_layer().weight

    def set_input_scale(self, adapter: str, input_scale: Tensor | None) -> None:
        """Multiplies the adapter's inputs by a vector (in_features,) from now on; None by none.

        A stack of experts also takes one for each, (experts, in_features). Equivalent to
        ``dW @ diag(input_scale)`` for dW. Raises TypeError or ValueError, as `Basis`, if it does
        not fit; RuntimeError if the adapter is merged.
        """
        check_kind("adapter", adapter, self.randlora_lambda)
        if adapter in self.merged_adapters:
            raise RuntimeError(f"adapter {adapter!r} is merged; unmerge it first")
        if input_scale is None and adapter not in self.input_scales:
            return
        basis = self.basis_of(adapter, self.randlora_lambda[adapter].device)
        self._use_basis(adapter, basis.with_input_scale(input_scale, self.experts))

    def _use_basis(self, adapter: str, basis: Basis) -> None:
        """`basis_of` gives the adapter this one from now on."""
        self.bases[adapter] = basis
        self.input_scales.pop(adapter, None)
        if basis.input_scale is not None:
            self.input_scales[adapter] = basis.input_scale

    @property
    def randlora_input_scale(self) -> SimpleNamespace:
        """What state dicts hold: ones for an adapter that could have a scale and has none.

        torch.distributed looks every key up as an attribute, and loads only keys that the model's
        own state dict has. Copies, because dcp.load writes into them.
        """
        scales = {
            name: self.input_scales.get(name, torch.ones(*self.experts, self.in_features)).clone()
            for name, lam in self.randlora_lambda.items()
            if self.basis_of(name, lam.device).takes_input_scale
        }
        return SimpleNamespace(**scales)

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, scale in vars(self.randlora_input_scale).items():
            destination[f"{prefix}{INPUT_SCALE}.{name}"] = scale

    def _load_from_state_dict(self, state_dict, prefix: str, *args) -> None:
        refuse_misfit(self, state_dict, prefix)
        # A state with a lambda is whole: without a scale it was trained without.
        keys = {name: f"{prefix}{INPUT_SCALE}.{name}" for name in self.randlora_lambda}
        whole = [n for n in keys if f"{prefix}{DIAGONALS[0]}.{n}" in state_dict]
        scales = {
            n: state_dict.pop(k, None) for n, k in keys.items() if k in state_dict or n in whole
        }
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, scale in scales.items():
            self.set_input_scale(name, None if no_scale(scale) else scale)

    def _adapted(self, names: list[str], x: Tensor, *args, **kwargs) -> Tensor:
        """The base layer's output and those of these adapters, by one operator if that may be."""
        base = self._modules["base_layer"]  # nn.Module's __getattr__ takes half a microsecond
        if len(names) == 1 and not args and not kwargs:
            name = names[0]
            dropout = self._modules["randlora_dropout"]._modules[name]
            drops = isinstance(dropout, nn.Dropout) and dropout.training
            if not drops and not self._widens(name, x):
                if (weight := plain_weight(base, x)) is not None:
                    return self._part(name, x, weight, base.bias)
        if names:
            refuse_cut(base)
        y = base(x, *args, **kwargs)
        for name in names:
            y = y + self._part(name, self.randlora_dropout[name](self._cast(name, x)))
        return y

    def _part(
        self, name: str, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """The adapter's output, added to that of the base layer if its weight is given."""
        device = x.device
        lam, gam = self._diagonals(name, device)
        basis = self.basis_of(name, device)
        return functional.linear(x, weight, bias, basis, lam, gam, self.scaling[name])

    def _widens(self, name: str, x: Tensor) -> bool:
        """Whether the adapter multiplies in a wider dtype than the base layer."""
        return False

    def _cast(self, name: str, x: Tensor) -> Tensor:
        """x as the adapter takes it if it runs apart from the base layer."""
        return x

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``scaling * B @ A'`` in the shape of the base layer's weight.

        Differentiable for lambda and gamma. In the dtype of lambda; under PEFT in the wider of
        lambda and gamma, and in float32 instead of 16 bits on a CPU. If FSDP2 has sharded the
        layer, a DTensor placed like its weight; all ranks must call. Raises ValueError for an
        unknown adapter. Source: PEFT's method.
        """
        check_kind("adapter", adapter, self.randlora_lambda)
        return self._delta(adapter, self._dtype_of(adapter))

    def _delta(self, name: str, dtype: torch.dtype) -> Tensor:
        device = self.randlora_lambda[name].device
        lam, gam = (t.to(dtype) for t in self._diagonals(name, device))
        basis = self.basis_of(name, device)
        delta = functional.delta_weight(basis, lam, gam, self.scaling[name])
        return laid_out_like(delta.T if self.fan_in_fan_out else delta, self._base_weight())

    def describe(self, adapter: str) -> str:
        """The adapter's basis, and what computes it."""
        weight = self._base_weight()
        basis = self.basis_of(adapter, weight.device)
        by = functional.what_computes(basis, weight.device, weight.dtype)
        hint = " (basis='hadamard' costs about LoRA's)" if basis.kind == "dense" else ""
        scaled = " with scaled inputs" if adapter in self.input_scales else ""
        return f"r={basis.r} {basis.name}{scaled} by {by}{hint}"

    def name_at(self, path: str) -> str:
        """What messages call the layer at that path of a model."""
        return path

    def extra_repr(self) -> str:
        parts = [f"{self.in_features}->{self.out_features}"]
        for name in self.randlora_lambda:
            state = ", inactive" if name not in self.active_adapters else ""
            state = ", disabled" if self.disabled else state
            state = ", merged" if name in self.merged_adapters else state
            parts.append(f"{name}: {self.describe(name)}{state}")
        return "; ".join(parts)


def layers_by_path(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers with adapters, ours without PEFT and with it; a tied one under several paths."""
    check_model(model)
    modules = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in modules if isinstance(module, AdaptedLayer)}
