"""PEFT's RandLoRA layers with forward, merging and delta weight on the compiled kernels."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.randlora.layer import Linear, RandLoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..basis import TernaryBasis
from ..kernels import serve
from ..nn.base_layer import can_fuse
from ..nn.state_dict import DIAGONALS, refuse_misfit
from ..ops import functional
from ..ops.dtensor import full_tensor, is_dtensor, laid_out_like
from ..ops.path import SIXTEEN_BITS, explain
from ..reference import scaled_basis_reference
from .bases import PackedBufferDict, layer_basis
from .merging import MergeableLayer

_REPR_TOKENS = 512  # a printed layer shows its path for this many tokens


class AcceleratedLayer(MergeableLayer):
    """Computes what a RandLoRA layer of PEFT computes, by ``torch.ops.randlora``.

    Mixed in before PEFT's layer class, which still does saving, adding, switching and the rest.
    A 16-bit x is multiplied by dense bases (PEFT's default) in 16 bits with float32 sums, unless
    ``float32_products`` is set. Devices without our kernels compute Hadamard and dense bases in
    plain torch, and others from PEFT's dense factors, with one warning per model.
    """

    randlora_A: PackedBufferDict
    randlora_B: PackedBufferDict
    float32_products = False  # of all layers; `enable` sets it

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.randlora_lambda]
        if self.disable_adapters or self.merged or not names:  # PEFT's: base alone, unmerging
            return super().forward(x, *args, **kwargs)
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace cannot record the kernels of randlora_ext; use torch.export or "
                "torch.compile, or merge the adapters first"
            )
        base, dtype = self.base_layer, x.dtype
        plain = not args and not kwargs and len(names) == 1 and not self._drops(names[0])
        if plain and self._can_fuse(x):
            basis, _ = self.basis_of(names[0], x.device)
            if basis is not None and not self._widens(basis, dtype):
                return self._linear(names[0], x, base.weight, base.bias, basis).to(dtype)
        result = base(x, *args, **kwargs)
        for name in names:
            x = x.to(self._input_dtype(name, x))
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
            part = x[at].to(self._input_dtype(name, x))
            result = result.index_add(0, at, self._adapter(name, part).to(result.dtype))
        return result

    def _adapter(self, name: str, x: Tensor) -> Tensor:
        """The adapter's part alone."""
        basis, reason = self.basis_of(name, x.device)
        if basis is not None:
            return self._linear(name, x, None, None, basis)
        self.randlora_A.warn_once(reason)
        first, second = self.get_scaled_bases(name, device=x.device)
        return F.linear(F.linear(x, first), second) * self.scaling[name]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """As PEFT's, differentiable, in float32 if CPU bases are 16-bit.

        For a layer that FSDP2 has sharded, a DTensor placed like its weight; all ranks must call.
        """
        device = self.randlora_lambda[adapter].device
        basis, reason = self.basis_of(adapter, device)
        if basis is None:
            self.randlora_A.warn_once(reason)
            first, second = self.get_scaled_bases(adapter)
            delta = second @ first * self.scaling[adapter]
        else:
            _, dtype = self._dtypes(adapter, device)
            lam, gam = (t.to(dtype) for t in self._diagonals(adapter, device))
            delta = functional.delta_weight(basis, lam, gam, self.scaling[adapter])
        return self._laid_out(delta.T if self.fan_in_fan_out else delta)

    def _laid_out(self, delta: Tensor) -> Tensor:
        return laid_out_like(delta, self._base_weight())

    def get_scaled_bases(
        self, adapter: str, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """PEFT's dense factors in the order in which x meets them: (A', B) or (B^T, A'^T)."""
        A, B = self.randlora_A[adapter], self.randlora_B[adapter]
        lam, gam = self.randlora_lambda[adapter], self.randlora_gamma[adapter]
        device = device or B.device
        dtype_of_B, dtype = self._dtypes(adapter, device)
        # The adapter's own number of bases; PEFT keeps one per layer, of the adapter added last.
        (n, d), D = gam.shape, max(self.in_features, self.out_features)
        if adapter in self.randlora_A.hadamard:
            basis = layer_basis(A, B, *self._sizes(adapter))
            A, B = basis.dense(device, dtype)  # A and B have no dense form
            B = B.to(dtype_of_B)
        else:
            A = A.to(device, dtype)[:, 0, :d]  # cast first: elements may be stored more exactly
            B = B.to(device, dtype_of_B)[:D, :n].flatten(1)
        make = functional.scaled_basis if serve(device.type) else scaled_basis_reference
        scaled = make(A, lam.to(device), gam.to(device))
        return (scaled, B) if d == self.in_features else (B.T, scaled.T)

    def basis_of(self, adapter: str, device: torch.device) -> tuple[TernaryBasis | None, str]:
        """(the adapter's packed basis, ""), or (None, why there is none)."""
        kind = device.type
        if kind != "meta" and not serve(kind) and adapter not in self.randlora_A.hadamard:
            return None, _no_kernels(kind)
        A, B = self.randlora_A, self.randlora_B
        if torch.compiler.is_dynamo_compiling():
            return getattr(A.traced, self._basis_while_tracing(adapter, A.token, B.token)), ""
        return layer_basis(A[adapter], B[adapter], *self._sizes(adapter)), ""

    @torch.compiler.assume_constant_result  # Dynamo runs it while it traces
    def _basis_while_tracing(self, adapter: str, token_of_A: int, token_of_B: int) -> str:
        # The tokens are arguments so that compiled code guards on them: other bases have others.
        A, B, sizes = self.randlora_A, self.randlora_B, self._sizes(adapter)
        name = "_".join(map(str, (adapter, token_of_B, *sizes)))
        setattr(A.traced, name, layer_basis(A[adapter], B[adapter], *sizes))
        return name

    def _sizes(self, adapter: str) -> tuple[int, int, int]:
        return self.in_features, self.out_features, self.r[adapter]

    def describe(self, adapter: str, tokens: int) -> tuple[str, str]:
        """(instruction set, basis and path for `tokens` rows of x), or ("", what runs and why)."""
        base = self.get_base_layer()
        weight = self._base_weight()
        basis, reason = self.basis_of(adapter, weight.device)
        if basis is None:
            return "", f"dense bases: {reason}"
        if weight.device.type != "meta" and not serve(weight.device.type):
            return "", f"plain torch on Hadamard bases: {_no_kernels(weight.device.type)}"
        alone = type(base) is nn.Linear and len(self.active_adapters) == 1
        drop = self.randlora_dropout[adapter].p if self._drops(adapter) else 0.0
        choice = explain(basis, tokens, weight.dtype, weight.device, alone, drop)
        # Drawn or loaded bases have about the density that was asked for.
        counted = " (counted)" if basis.kind == "imported" else ""
        isa = choice.isa.removesuffix(" kernels")
        if basis.kind == "dense":
            return isa, f"r={basis.r} dense {choice.path} (basis='hadamard' costs about LoRA's)"
        if basis.kind == "hadamard":
            return isa, f"r={basis.r} hadamard {choice.path}"
        return isa, f"r={basis.r} density {basis.density:.3g}{counted} {choice.path}"

    def _base_weight(self) -> Tensor:
        return self.get_base_layer().weight

    def extra_repr(self) -> str:
        parts = [f"{self.in_features}->{self.out_features}"]
        for name in self.randlora_lambda:
            isa, told = self.describe(name, _REPR_TOKENS)
            if isa:
                told = f"{told} at {_REPR_TOKENS} tokens"
            else:
                told = f"r={self.r[name]} {told.partition(':')[0]}"
            parts.append(f"{name}: {told}" + ", merged" * (name in self.merged_adapters))
        return "; ".join(parts)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        refuse_misfit(self, state_dict, prefix, *args)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _linear(
        self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, basis: TernaryBasis
    ) -> Tensor:
        lam, gam = self._diagonals(name, x.device)
        return functional.linear(x, weight, bias, basis, lam, gam, self.scaling[name])

    def _can_fuse(self, x: Tensor) -> bool:
        return can_fuse(self.base_layer, x)

    def _diagonals(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Lambda and gamma, gathered if FSDP2 has sharded them."""
        lam, gam = (full_tensor(getattr(self, each)[name]).to(device) for each in DIAGONALS)
        return lam, gam

    def _widens(self, basis: TernaryBasis, dtype: torch.dtype) -> bool:
        return self.float32_products and basis.kind == "dense" and dtype in SIXTEEN_BITS

    def _input_dtype(self, name: str, x: Tensor) -> torch.dtype:
        """The dtype to which x is cast before the adapter."""
        basis, _ = self.basis_of(name, x.device)
        narrow = basis is not None and basis.kind == "dense" and x.dtype in SIXTEEN_BITS
        if narrow and not self.float32_products:
            return x.dtype
        return self._dtypes(name, x.device)[1]

    def _dtypes(self, name: str, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of B, and of scaled A, as PEFT casts them and x."""
        dtype = self.randlora_B.dtypes[name]
        if device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            return torch.float32, torch.float32  # as PEFT, since a CPU is slow in 16 bits
        lam, gam = self.randlora_lambda[name].dtype, self.randlora_gamma[name].dtype
        return dtype, torch.promote_types(torch.promote_types(dtype, lam), gam)

    def _drops(self, name: str) -> bool:
        dropout = self.randlora_dropout[name]
        return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


class AcceleratedLinear(AcceleratedLayer, Linear):
    """`peft.tuners.randlora.layer.Linear` on the compiled kernels: nn.Linear and Conv1D."""


def _no_kernels(device_type: str) -> str:
    return f"there are no randlora_ext kernels for device type {device_type!r}"


def layers_with(model: Any, adapter_name: str | None = None) -> dict[str, RandLoraLayer]:
    """The RandLoRA layers of a PeftModel, ours or stock PEFT's, by their paths in the base model.

    Raises TypeError if there are none, ValueError if `adapter_name` is no adapter of the model.
    """
    layers = {}
    if isinstance(model, PeftModel) and isinstance(model.base_model, BaseTuner):
        modules = model.base_model.model.named_modules()
        layers = {path: m for path, m in modules if isinstance(m, RandLoraLayer)}
    if not layers:
        raise TypeError(f"model must be a PeftModel with RandLoRA layers, got {type(model)}")
    if adapter_name is None:
        return layers
    if adapter_name not in model.peft_config:
        raise ValueError(
            f"adapter_name must be one of {list(model.peft_config)}, got {adapter_name!r}"
        )
    return {path: m for path, m in layers.items() if adapter_name in m.randlora_lambda}


def refuse_sharded(model: PeftModel) -> None:
    """Raises ValueError if a rank holds only parts of the weights."""
    if any(is_dtensor(parameter) for parameter in model.parameters()):
        raise ValueError(
            "model is sharded over ranks; save the adapter with save_pretrained and export it from "
            "an unsharded model"
        )


def add_adapter(
    layer: AcceleratedLayer, name: str, A: PackedBufferDict, B: PackedBufferDict, config
) -> None:
    """Adds an adapter to a layer, passing its options as this version of PEFT expects."""
    if "config" in inspect.signature(layer.update_layer).parameters:  # since 0.20
        layer.update_layer(name, A, B, config.r, config=config)
    else:
        options = (config.randlora_alpha, config.randlora_dropout, config.init_weights)
        layer.update_layer(name, A, B, config.r, *options)
