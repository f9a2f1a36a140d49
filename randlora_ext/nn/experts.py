"""Adapters of a parameter of any module, such as the stacked experts of a mixture model."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..basis import Basis
from ..checks import at_most_ten
from ..ops import hadamard
from ..ranks import is_dtensor, laid_out_like
from .adapted_layer import AdaptedLayer, layers_by_path
from .base_layer import check_is_called, check_no_plan, check_whole
from .linear import RandLoraLinear
from .paths import in_base_model

# Models of transformers that store experts as (in, out), and the classes of these, by model_type.
# Modules say so themselves by ``is_transposed``, but Llama 4's, and a folder has no modules.
TRANSPOSED = {
    "aria_text": "AriaExperts",
    "gpt_oss": "GptOssExperts",
    "llama4_text": "Llama4TextExperts",
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",
}


class ParameterPlace(NamedTuple):
    """Where a parameter lies in a model."""

    module: str  # the path of the module that has it
    name: str  # in that module


class ParameterSizes(NamedTuple):
    """Of a parameter that can be adapted."""

    in_features: int
    out_features: int
    transposed: bool  # whether it is (in, out), or (experts, in, out)
    experts: int


class AdaptedParameter(AdaptedLayer):
    """The module `base_layer`, which computes with W + dW where it has the parameter W.

    W is (experts, out, in), (experts, in, out) if the module says ``is_transposed = True``, as
    those of transformers do but Llama 4's, which is known by name, or (out, in), one expert. Every
    expert has a lambda and a gamma: ``randlora_lambda`` (experts, r, n) and ``randlora_gamma``
    (experts, n, d). All share the bases.

    The layers of several parameters of one module are nested; the outermost calls the module. Only
    lambda and gamma are kept for backward, and W + dW by the module itself. Source: PEFT's
    ``lora.ParamWrapper``.
    """

    # `calibrate` sets it, to see products with W itself and not with W + dW; dW is zero then.
    takes_base_weight = False

    def _set_sizes(self, base_layer: nn.Module, parameter_name: str) -> tuple[int, int]:
        """Finds what `base_layer` says of the parameter; returns (in_features, out_features)."""
        self.parameter_name = parameter_name
        base = base_layer.get_base_layer() if isinstance(base_layer, AdaptedLayer) else base_layer
        sizes = sizes_of(base, parameter_name)
        self.transposed = sizes.transposed
        self.experts = (sizes.experts,)
        return sizes.in_features, sizes.out_features

    def _base_weight(self) -> Tensor:
        return getattr(self.get_base_layer(), self.parameter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        changed: dict[str, Tensor] = {}
        layer: nn.Module = self
        while isinstance(layer, AdaptedParameter):
            names = [] if layer.takes_base_weight else layer._adapters_to_add()
            if names:
                changed[layer.parameter_name] = layer._adapted_weight(names)
            if layer.merged_adapters:
                layer._warn_if_trained()
            layer = layer.base_layer
        return functional_call(layer, changed, args, kwargs) if changed else layer(*args, **kwargs)

    def _adapted_weight(self, names: list[str]) -> Tensor:
        weight = self._base_weight()
        offloaded = weight.is_meta and hasattr(self.get_base_layer(), "_hf_hook")  # accelerate's
        if is_dtensor(weight) or weight.numel() == 0 or offloaded:
            raise RuntimeError(
                f"{self.parameter_name} is not whole here before its module runs: let fully_shard "
                "take a module around this one, such as the block; offloading, DeepSpeed ZeRO-3 "
                "and tensor parallelism are not supported for target_parameters"
            )
        for name in names:
            weight = self._plus_delta(name, weight, *self._diagonals(name, weight.device))
        return weight

    def _plus_delta(self, name: str, weight: Tensor | None, lam: Tensor, gam: Tensor) -> Tensor:
        """W + dW in the dtype of W, or dW in that of lambda, in the shape of W."""
        basis, shape = self.basis_of(name, lam.device), self._base_weight().shape
        stack = None if weight is None else weight.reshape(*self.experts, *shape[-2:])
        input_scale, scaling = self._input_scale(name, lam.device), self.scaling[name]
        changed = stacked_weight(stack, basis, lam, gam, input_scale, scaling, self.transposed)
        return changed.view(shape)

    def _delta(self, name: str, dtype: torch.dtype) -> Tensor:
        diagonals = self._diagonals(name, self.randlora_lambda[name].device)
        delta = self._plus_delta(name, None, *(t.to(dtype) for t in diagonals))
        return laid_out_like(delta, self._base_weight())

    def name_at(self, path: str) -> str:
        return f"{path}.{self.parameter_name}"

    def describe(self, adapter: str) -> str:
        return f"{self.parameter_name} of {self.experts[0]} experts, {super().describe(adapter)}"


class RandLoraParameter(AdaptedParameter, RandLoraLinear):
    """`RandLoraLinear` of a parameter of any module: what `apply_randlora` makes of experts.

    Args:
        base_layer: the module, or a `RandLoraParameter` of another parameter of it.
        parameter_name: of a parameter as `AdaptedParameter` has it.
        **options: r, randlora_alpha, seed and adapter_name of `RandLoraLinear`.

    Raises TypeError or ValueError, naming the argument.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        parameter_name: str,
        adapter_name: str = "default",
        **options: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = self._set_sizes(base_layer, parameter_name)
        self.fan_in_fan_out = False  # experts have `transposed`
        self._make_empty(base_layer, adapter_name)
        self.update_layer(adapter_name, **options)
        self._freeze_base()
        self.train(base_layer.training)

    def _freeze_base(self) -> None:
        self._base_weight().requires_grad_(False)


def stacked_weight(
    stack: Tensor | None,
    basis: Basis,
    lam: Tensor,
    gam: Tensor,
    input_scale: Tensor | None,
    scaling: float,
    transposed: bool,
) -> Tensor:
    """W + dW of stacked experts (experts, out, in), or (experts, in, out) if they are `transposed`;
    dW alone if `stack` is None.

    Lambda is (experts, r, n), gamma (experts, n, d), the input scale (experts, in). W + dW has the
    dtype of W, dW that of lambda.
    """
    arguments = hadamard.basis_arguments(basis, lam.device, scaling, lam.dtype, input_scale)
    # To the operator a transposed weight is that of a layer in the other direction.
    arguments["expand"] = basis.expand != transposed
    return hadamard.weight(stack, lam, gam, **arguments)


def sizes_of(module: nn.Module, name: str) -> ParameterSizes:
    """Those of a parameter; TypeError or ValueError, naming it, if it cannot be adapted."""
    weight = getattr(module, name)
    class_name = type(module).__name__
    argument = f"target_parameters: {class_name}.{name}"
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        got = getattr(weight, "dtype", type(weight))
        raise TypeError(f"{argument} must be a floating point parameter, got {got}")
    check_whole(weight, argument)
    shape = getattr(weight, "ds_shape", weight.shape)  # of ZeRO-3
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"{argument} must have two or three dimensions, got {tuple(shape)}")
    if len(shape) == 2:
        out_features, in_features = shape
        return ParameterSizes(in_features, out_features, transposed=False, experts=1)
    experts, rows, columns = shape
    if class_name in TRANSPOSED.values() or getattr(module, "is_transposed", False):
        return ParameterSizes(rows, columns, transposed=True, experts=experts)
    return ParameterSizes(columns, rows, transposed=False, experts=experts)


def matching_parameters(model: nn.Module, targets: Sequence[str]) -> dict[str, ParameterPlace]:
    """By its name in the base model, where each parameter lies that ``target_parameters`` match, as
    in PEFT: one of them, or ending in ``.`` and one of them. In the model's order, which is that of
    nesting.

    Raises TypeError if they are no names; ValueError if nothing matches, or a parameter that has
    several names, is cut over ranks, or whose module is never called.
    """
    if isinstance(targets, str) or not all(isinstance(name, str) for name in targets):
        raise TypeError(f"target_parameters must be a list of names, got {targets!r}")
    if not targets:
        return {}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    ends = tuple(f".{name}" for name in targets)
    layers = layers_by_path(model)
    found = {}
    for path, module in model.named_modules():
        for name_in_module, parameter in module.named_parameters(recurse=False):
            name = f"{in_base_model(path, layers)}.{name_in_module}"
            if not f".{name}".endswith(ends):
                continue
            argument = f"target_parameters: {name!r}"
            check_no_plan(model, name, argument)
            check_is_called(model, path, argument)
            if uses[id(parameter)] > 1:
                raise ValueError(
                    f"{argument} is used under several names, and one would be adapted"
                )
            found[name] = ParameterPlace(path, name_in_module)
    if not found:
        names = [name for name, p in model.named_parameters() if p.dim() == 3]
        raise ValueError(
            f"target_parameters {targets!r} matches no parameter of {type(model).__name__}; those "
            f"of three dimensions are {at_most_ten(names)}"
        )
    return found
