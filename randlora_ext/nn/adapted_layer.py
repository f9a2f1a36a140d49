"""What a layer with RandLoRA adapters computes: `RandLoraLinear` and PEFT's layers alike."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..basis import Basis
from ..checks import check_model, check_one_of
from ..ops import functional
from ..ranks import full_tensor, laid_out_like
from .base_layer import do_nothing, plain_operands, refuse_cut
from .input_scale import wrong_numbers
from .merging import Mergeable, adapter_dtype
from .state_dict import refuse_misfits
from .uncalibrated import warn_if_uncalibrated


class AdaptedLayer(Mergeable):
    """``base_layer(x) + sum over adapters of scaling * dropout(x) dW^T``, dW itself, and merging.

    Classes that mix it in make the adapters, choose the active ones, and say which basis and which
    dtype each has.
    """

    base_layer: nn.Module
    _modules: dict[str, Any]  # read directly: nn.Module's __getattr__ takes half a microsecond
    fan_in_fan_out = False  # whether the weight is (in, out)
    # Of each adapter, by its name, as what `Mergeable` names.
    r: dict[str, int]
    bases: dict[str, Basis]
    scaling: dict[str, float]
    randlora_dropout: nn.ModuleDict
    # Those whose outputs are added, unless the layer is disabled.
    active_adapters: Sequence[str]
    disabled = False
    # Adapters of which forward is still to look if they are trained without calibration.
    _uncalibrated: frozenset[str] = frozenset()

    def _force_module_call(self) -> None:
        """Makes nn.TransformerEncoderLayer call this layer in eval mode. Its fused kernel would
        take ``layer.weight``, but not beside a forward hook: here one on a dictionary that is not
        called."""
        self.randlora_dropout.register_forward_pre_hook(do_nothing)

    def _prepare_adapters(self) -> list[str]:
        """The names of the adapters whose outputs forward adds now. Warns if merged ones would be
        trained; a disabled layer under PEFT is unmerged first."""
        raise NotImplementedError

    def _trained_adapters(self) -> list[str]:
        """The active ones that train; none of a disabled layer."""
        active = [] if self.disabled else self.active_adapters
        lambdas = self.randlora_lambda
        return [name for name in active if name in lambdas and lambdas[name].requires_grad]

    def basis_of(self, adapter: str, device: torch.device) -> Basis:
        """The basis by which the adapter multiplies on that device."""
        return self.bases[adapter]

    def _diagonals(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Lambda and gamma, gathered if FSDP2 has sharded them."""
        modules = self._modules
        lam = getattr(modules["randlora_lambda"], name)
        gam = getattr(modules["randlora_gamma"], name)
        if type(lam) is type(gam) is nn.Parameter and lam.device == device == gam.device:
            return lam, gam
        return full_tensor(lam).to(device), full_tensor(gam).to(device)

    def get_base_layer(self) -> nn.Module:
        """The frozen layer, or the module that has the parameter. Source: PEFT's method."""
        return self.base_layer

    def _base_weight(self) -> Tensor:
        return self.get_base_layer().weight  # type: ignore[return-value]

    def _input_scale(self, name: str, device: torch.device) -> Tensor | None:
        """By what the adapter multiplies its inputs; None of bases that cannot be scaled."""
        input_scale = self._modules["randlora_input_scale"]._buffers.get(name)
        if input_scale is None or input_scale.device == device:
            return input_scale
        return input_scale.to(device)

    def _reset_input_scale(self, adapter: str, on_hadamard: bool) -> None:
        """Ones for an adapter on Hadamard bases, nothing for one on others."""
        if on_hadamard:
            device = self.randlora_lambda[adapter].device
            self.randlora_input_scale.reset(adapter, (*self.experts, self.in_features), device)
        elif adapter in self.randlora_input_scale:
            del self.randlora_input_scale[adapter]

    @torch.no_grad()
    def set_input_scale(self, adapter: str, input_scale: Tensor) -> None:
        """Multiplies the adapter's inputs by a vector (in_features,) from now on.

        A stack of experts also takes one for each, (experts, in_features). Equivalent to
        ``dW @ diag(input_scale)`` for dW. The numbers are copied into the buffer
        ``randlora_input_scale[adapter]``, which is float32.

        Raises ValueError for an unknown adapter, one on other bases than Hadamard ones, a tensor of
        another shape, or numbers that are not positive and finite; TypeError if it is no floating
        tensor; RuntimeError if the adapter is merged or on the meta device.
        """
        check_one_of("adapter", adapter, self.randlora_lambda)
        if adapter in self.merged_adapters:
            raise RuntimeError(f"adapter {adapter!r} is merged; unmerge it first")
        if adapter not in self.randlora_input_scale:
            kind = self.basis_of(adapter, self.randlora_lambda[adapter].device).kind
            raise ValueError(f"input_scale goes with Hadamard bases, got kind={kind!r}")
        buffer = self.randlora_input_scale[adapter]
        if buffer.is_meta:
            raise RuntimeError(f"adapter {adapter!r} has no numbers (meta device)")
        if not isinstance(input_scale, Tensor) or not input_scale.is_floating_point():
            raise TypeError(f"input_scale must be a floating tensor, got {input_scale!r}")
        if input_scale.shape not in (buffer.shape, buffer.shape[-1:]):
            sizes = "(experts, in_features)" if self.experts else "(in_features,)"
            raise ValueError(
                f"input_scale must be {sizes} = {tuple(buffer.shape)}, got "
                f"{tuple(input_scale.shape)}"
            )
        if wrong := wrong_numbers("input_scale", input_scale):
            raise ValueError(wrong)
        buffer.copy_(input_scale)

    def is_calibrated(self, adapter: str) -> bool:
        """Whether the adapter's inputs are scaled: ``randlora_input_scale[adapter]`` holds another
        number than one. False on bases other than Hadamard and on the meta device; ValueError for
        an unknown adapter.
        """
        check_one_of("adapter", adapter, self.randlora_lambda)
        if adapter not in self.randlora_input_scale:
            return False
        input_scale = self.randlora_input_scale[adapter]
        return not input_scale.is_meta and bool((input_scale != 1).any())

    def _load_from_state_dict(self, state_dict, prefix: str, *args) -> None:
        path = prefix.removesuffix(".")
        refuse_misfits({path: self}, state_dict, f"the state dict of {path or 'the layer'}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _output_with_adapters(self, names: list[str], x: Tensor, *args, **kwargs) -> Tensor:
        """The base layer's output and those of these adapters, by one operator if that may be."""
        if self._uncalibrated:
            warn_if_uncalibrated(self, names)
        base = self._modules["base_layer"]
        if len(names) == 1 and not args and not kwargs:
            name = names[0]
            dropout = self._modules["randlora_dropout"]._modules[name]
            drops = isinstance(dropout, nn.Dropout) and dropout.training
            if not drops:
                operands = plain_operands(base, x)
                if operands is not None:
                    return self._adapter_output(name, x, *operands)
        if names:
            refuse_cut(base)
        y = base(x, *args, **kwargs)
        for name in names:
            y = y + self._adapter_output(name, self.randlora_dropout[name](x))
        return y

    def _adapter_output(
        self, name: str, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """The adapter's output, added to that of the base layer if its weight is given."""
        device = x.device
        lam, gam = self._diagonals(name, device)
        basis, input_scale = self.basis_of(name, device), self._input_scale(name, device)
        return functional.linear(x, weight, bias, basis, lam, gam, self.scaling[name], input_scale)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``scaling * B @ A'``, or its transpose, in the shape of the base layer's weight.

        Differentiable for lambda and gamma. In float32, or float64 beside a float64 weight. If
        FSDP2 has sharded the layer, a DTensor placed like its weight; all ranks must call. Raises
        ValueError for an unknown adapter. Source: PEFT's method.
        """
        check_one_of("adapter", adapter, self.randlora_lambda)
        return self._delta(adapter, adapter_dtype(self._base_weight().dtype))

    def _delta(self, name: str, dtype: torch.dtype) -> Tensor:
        device = self.randlora_lambda[name].device
        lam, gam = (t.to(dtype) for t in self._diagonals(name, device))
        basis, input_scale = self.basis_of(name, device), self._input_scale(name, device)
        delta = functional.delta_weight(basis, lam, gam, self.scaling[name], input_scale)
        return laid_out_like(delta.T if self.fan_in_fan_out else delta, self._base_weight())

    def describe(self, adapter: str) -> str:
        """The adapter's basis, whether it is calibrated, and what computes it."""
        weight = self._base_weight()
        basis = self.basis_of(adapter, weight.device)
        words = f"r={basis.r} {basis.name}"
        if adapter in self.randlora_input_scale:
            words += " (calibrated)" if self.is_calibrated(adapter) else " (not calibrated)"
        words += f" by {functional.what_computes(basis, weight.device, weight.dtype)}"
        if basis.kind == "dense":
            words += " (basis='hadamard' costs about LoRA's)"
        return words

    def _name_at(self, path: str) -> str:
        """What messages call the layer at that path of a model."""
        return path

    def extra_repr(self) -> str:
        words = [f"{self.in_features}->{self.out_features}"]
        for name in self.randlora_lambda:
            state = ""
            if name in self.merged_adapters:
                state = ", merged"
            elif self.disabled:
                state = ", disabled"
            elif name not in self.active_adapters:
                state = ", inactive"
            words.append(f"{name}: {self.describe(name)}{state}")
        return "; ".join(words)


def layers_by_path(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers with adapters, ours without PEFT and with it; a tied one under several paths."""
    check_model(model)
    modules = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in modules if isinstance(module, AdaptedLayer)}


def layers_by_name(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Each once, by the name of what it adapts: of a module or a parameter."""
    check_model(model)
    modules = model.named_modules()
    return {m._name_at(path): m for path, m in modules if isinstance(m, AdaptedLayer)}
