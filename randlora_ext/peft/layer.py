"""PEFT's RandLoRA layers with forward, merging and delta weight on the compiled kernels."""

from collections import Counter
from typing import Any

import peft
import torch
from peft.tuners.randlora.layer import Linear, RandLoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..basis import Basis
from ..checks import check_model, warn_user
from ..devices import cuda_refusal, has_kernels
from ..nn.adapted_layer import AdaptedLayer
from ..nn.adapter_record import RECORD, AdapterRecord
from ..nn.base_layer import is_conv1d
from ..nn.experts import AdaptedParameter
from ..nn.input_scale import InputScales
from ..tracing import constant_while_tracing
from .bases import PackedBasis, PackedBufferDict, layer_basis
from .config import description_of_config


class AcceleratedLinear(AdaptedLayer, Linear):
    """Computes what PEFT's ``Linear`` of RandLoRA computes, by ``torch.ops.randlora``.

    Devices without our kernels compute Hadamard bases in plain torch, and the ternary ones of stock
    configurations as dense bases, with a warning; ``basis="independent"`` raises ValueError there.
    """

    randlora_A: PackedBufferDict
    randlora_B: PackedBufferDict
    # Of adapters whose bases are tensors; `bases` has those of the others.
    tensor_bases: dict[str, Basis]
    _tensor_bases_from: tuple | None  # the device and the contents from which they are made
    # The adapter of each row while a mixed batch runs. Dynamo guards on this attribute, and not on
    # the hook that brings the names, so that other rows are compiled again.
    _rows: tuple[str, ...] | None = None
    disabled = Linear.disable_adapters  # PEFT's property, by our layers' name
    # Of these PEFT deletes an adapter's entries with it.
    other_param_names = (
        *Linear.other_param_names, "bases", "tensor_bases", "randlora_input_scale", RECORD
    )  # fmt: skip

    def __init__(
        self,
        base_layer: nn.Module,
        randlora_A: PackedBufferDict,
        randlora_B: PackedBufferDict,
        adapter_name: str,
        config: peft.RandLoraConfig,
        sizes: tuple[int, int],
    ) -> None:
        """`sizes`: in_features and out_features. Source: PEFT's ``Linear``, which reads them off an
        nn.Linear or a Conv1D, and knows no other layers."""
        nn.Module.__init__(self)
        self.base_layer = base_layer  # before the adapters, as PEFT's: optimizers count parameters
        self._add_attributes(adapter_name, config, sizes)
        self.fan_in_fan_out = is_conv1d(base_layer)
        self.update_layer(adapter_name, randlora_A, randlora_B, config.r, config=config)

    def _add_attributes(
        self, adapter_name: str, config: peft.RandLoraConfig, sizes: tuple[int, int]
    ) -> None:
        """Those of a layer that still lacks its first adapter."""
        for name, value in vars(RandLoraLayer(nn.Linear(*sizes, device="meta"))).items():
            if name != "base_layer":
                setattr(self, name, value)
        self._active_adapter = adapter_name
        self.bases = {}
        self.tensor_bases = {}
        self._tensor_bases_from = None
        self.randlora_input_scale = InputScales()
        self.randlora_record = nn.ModuleDict()
        self._force_module_call()

    def update_layer(
        self,
        adapter_name: str,
        A: PackedBufferDict,
        B: PackedBufferDict,
        r: int,
        config: peft.RandLoraConfig,
        **kwargs: Any,
    ) -> None:
        super().update_layer(adapter_name, A, B, r, config=config, **kwargs)
        self.cast_like_base(adapter_name)
        made = description_of_config(config)  # None: PEFT drew the bases
        self._reset_input_scale(adapter_name, made is not None and made.kind == "hadamard")
        for of_earlier in (self.bases, self.randlora_record):  # an adapter of the same name
            if adapter_name in of_earlier:
                del of_earlier[adapter_name]
        if made is not None:
            sizes = self.in_features, self.out_features
            self.bases[adapter_name] = Basis.described(made, *sizes, r).canonical()
            record = AdapterRecord(made, r, config.randlora_alpha, *sizes)
            self.randlora_record[adapter_name] = record  # files do not hold the bases

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """As PEFT's, but lambda and gamma keep their dtype: ``low_cpu_mem_usage=True`` calls this
        after it has loaded them, and 16 bits would lose what the file holds."""
        both = self.randlora_lambda, self.randlora_gamma
        loaded = [diagonals[adapter_name] for diagonals in both]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for diagonals, parameter in zip(both, loaded, strict=True):
            to = diagonals[adapter_name].device
            if parameter.device != to:
                parameter = nn.Parameter(parameter.detach().to(to), parameter.requires_grad)
            diagonals[adapter_name] = parameter
        # PEFT moves only what is in dictionaries of its own classes.
        if adapter_name in self.randlora_input_scale:
            self.randlora_input_scale.move(adapter_name, self.randlora_lambda[adapter_name].device)

    def cast_like_base(self, adapter_name: str) -> None:
        """Gives lambda and gamma the dtype of the base layer, as PEFT does; the model then casts
        them to float32 again, unless it was told ``autocast_adapter_dtype=False``."""
        of_peft: Any = self
        _, dtype = of_peft._get_base_layer_device_and_dtype(self.get_base_layer())
        if dtype is None or not dtype.is_floating_point:
            return
        for diagonals in (self.randlora_lambda, self.randlora_gamma):
            old = diagonals[adapter_name]
            if not old.is_meta and old.dtype != dtype:
                diagonals[adapter_name] = nn.Parameter(old.detach().to(dtype), old.requires_grad)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapter_names = None
        if self._rows is not None or kwargs:
            adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        y = self._output_with_adapters(self._prepare_adapters(), x, *args, **kwargs)
        return y if y.dtype is x.dtype else y.to(x.dtype)

    def _prepare_adapters(self) -> list[str]:
        if self.disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return []
        if self.merged_adapters:
            self._warn_if_trained()
            return []
        own = self._modules["randlora_lambda"]
        return [name for name in self.active_adapters if name in own]

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args, **kwargs) -> Tensor:
        """Row b of the batch through adapter ``adapter_names[b]``."""
        if len(adapter_names) != len(x):
            raise ValueError(
                f"adapter_names must have one name per input, got {len(adapter_names)} for {len(x)}"
            )
        if self.merged:
            raise ValueError("adapter_names needs unmerged adapters; call unmerge_adapter() first")
        result = self.base_layer(x, *args, **kwargs)
        for name in self.randlora_lambda:
            of_name = [row for row, other in enumerate(adapter_names) if other == name]
            if not of_name:
                continue
            rows = torch.tensor(of_name, device=x.device)
            added = self._adapter_output(name, x[rows])
            result = result.index_add(0, rows, added.to(result.dtype))
        return result.to(x.dtype)

    def basis_of(self, adapter: str, device: torch.device) -> Basis:
        if adapter in self.bases:
            return self.bases[adapter]
        # Versions of the contents are plain numbers, on which compiled code guards.
        held = self._modules
        a_version, b_version = held["randlora_A"].version, held["randlora_B"].version
        if torch.compiler.is_dynamo_compiling():
            self._make_bases_while_tracing(device, a_version, b_version)
            return self.tensor_bases[adapter]
        origin = device, a_version, b_version
        if self._tensor_bases_from == origin and adapter in self.tensor_bases:
            return self.tensor_bases[adapter]
        basis = self._make_basis(adapter, device)
        if self._tensor_bases_from != origin:
            self.tensor_bases.clear()
        self._tensor_bases_from = origin
        self.tensor_bases[adapter] = basis
        return basis

    def _make_basis(self, adapter: str, device: torch.device) -> Basis:
        A, B = self.randlora_A[adapter], self.randlora_B[adapter]
        with_kernels = device.type == "meta" or has_kernels(device)
        basis = layer_basis(
            A, B, self.in_features, self.out_features, self.r[adapter], with_kernels
        )
        if not with_kernels and basis.kind == "dense" and isinstance(A, PackedBasis):
            warn_user(
                "RandLoRA layers multiply by dense bases: the CUDA kernels of randlora_ext are "
                f"{cuda_refusal(device)}"
            )
        return basis

    @constant_while_tracing
    def _make_bases_while_tracing(self, device: torch.device, *versions: int) -> None:
        # All, since Dynamo looks into the dictionary only once.
        for adapter in self.randlora_lambda:
            self.basis_of(adapter, device)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"tensor_bases": {}}  # found again

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's, but all adapters are added before the sum is rounded, and W is kept in CPU
        memory, if quantized on its own device, so that unmerging restores every bit."""
        names = self._names_to_merge(adapter_names)
        if names:
            self._merge(names, safe_merge)

    @torch.no_grad()
    def check_safe_to_merge(self, adapter_names: list[str] | None) -> None:
        """Raises what ``merge(safe_merge=True)`` would."""
        names = self._names_to_merge(adapter_names)
        if names:
            self._merged_weight(names, safe_merge=True)

    def _names_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        chosen = check_adapters_to_merge(self, adapter_names) or []
        return [name for name in dict.fromkeys(chosen) if name in self.randlora_lambda]


class AcceleratedParameter(AdaptedParameter, AcceleratedLinear):
    """The adapters of one parameter of a module, as PEFT's functions know layers."""

    def __init__(
        self,
        module: nn.Module,
        parameter_name: str,
        A: PackedBufferDict,
        B: PackedBufferDict,
        adapter_name: str,
        config: peft.RandLoraConfig,
    ) -> None:
        nn.Module.__init__(self)
        sizes = self._set_parameter(module, parameter_name)
        self._add_attributes(adapter_name, config, (sizes.in_features, sizes.out_features))
        self.update_layer(adapter_name, A, B, config.r, config=config)

    def update_layer(
        self,
        adapter_name: str,
        A: PackedBufferDict,
        B: PackedBufferDict,
        r: int,
        config: peft.RandLoraConfig,
        **kwargs: Any,
    ) -> None:
        super().update_layer(adapter_name, A, B, r, config=config, **kwargs)
        for diagonals in (self.randlora_lambda, self.randlora_gamma):  # every expert gets a copy
            one = diagonals[adapter_name]
            stack = one.detach().repeat(*self.experts, 1, 1)
            diagonals[adapter_name] = nn.Parameter(stack, one.requires_grad)
        if not config.init_weights:  # PEFT's random lambdas, for each expert
            nn.init.normal_(self.randlora_lambda[adapter_name])

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple:
        return self._base_weight().device, self._base_weight().dtype

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT converts matrices


def kernel_summary(model: nn.Module) -> str:
    """One line: the shapes and bases of the RandLoRA layers in `model`, of PEFT or
    `RandLoraLinear`, and what computes them."""
    check_model(model)
    counts: Counter[str] = Counter()  # of adapters
    total = 0
    for layer in model.modules():
        if isinstance(layer, AdaptedLayer):
            shape = f"{layer.in_features}->{layer.out_features}"
            names = [name for name in layer.active_adapters if name in layer.randlora_lambda]
            counts.update(f"{shape} {layer.describe(name)}" for name in names)
            total += bool(names)
        elif isinstance(layer, RandLoraLayer):
            without = "made without randlora_ext.peft.enable()"
            counts[f"on PEFT's own code: {without}"] += 1
            total += 1
    if not counts:
        return "no RandLoRA layers"
    listed = ", ".join(f"{count}x {what}" for what, count in sorted(counts.items()))
    return f"{total} RandLoRA layers: {listed}"
