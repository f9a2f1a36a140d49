"""Adapters of a module's parameters, such as the stacked experts of a mixture model."""

import os
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..checks import at_most_ten
from ..ops import hadamard
from ..ranks import is_dtensor, laid_out_like
from .adapted_layer import AdaptedLayer
from .base_layer import check_is_called, check_no_plan, check_whole
from .merging import release_weight
from .uncalibrated import warn_if_uncalibrated

# The classes of transformers' models that store experts as (in, out), but do not say so by
# ``is_transposed``.
TRANSPOSED = ("Llama4TextExperts",)
ADAPTERS = "adapted_parameters"  # of a module, in the names of its adapters' tensors

# While a module runs, W + dW is its parameter, which another thread would take for W.
_one_thread = threading.RLock()
os.register_at_fork(  # so that no child process finds it taken, or W + dW
    before=_one_thread.acquire,
    after_in_parent=_one_thread.release,
    after_in_child=_one_thread.release,
)


class ParameterSizes(NamedTuple):
    """Of a parameter that can be adapted."""

    in_features: int
    out_features: int
    transposed: bool  # whether it is (in, out), or (experts, in, out)
    experts: int


class AdaptedModule(nn.Module):
    """A module that computes with W + dW wherever it has an adapted parameter W.

    ``base_layer`` is the module, ``adapted_parameters`` has an `AdaptedParameter` for each of
    them, by its name in the module. Only lambda and gamma are kept for backward, and W + dW by the
    module itself. PEFT's LoRA has one ``lora.ParamWrapper`` for each parameter, nested.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapted_parameters = nn.Module()  # an nn.ModuleDict takes no parameter called "keys"

    @property
    def adapters(self) -> dict[str, Any]:
        """Each `AdaptedParameter` by the name of its parameter."""
        return self.adapted_parameters._modules

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A module that is compiled in one graph gets W + dW as an input, and keeps its parameter.
        if torch.compiler.is_compiling():
            return self._with_adapters(*args, **kwargs)
        with _one_thread:
            return self._with_adapters(*args, **kwargs)

    def _with_adapters(self, *args: Any, **kwargs: Any) -> Any:
        changed: dict[str, Tensor] = {}
        for name, parameter in self.adapters.items():
            adapted = parameter.adapted_weight()
            if adapted is not None:
                changed[name] = adapted
        if not changed:
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, changed, args, kwargs)

    def unload_and_optionally_merge_module(self, merge: bool, *args: Any, **kwargs: Any) -> Any:
        """The module that PEFT puts in the place of this one, with its adapters merged or not."""
        for parameter in self.adapters.values():
            if merge:
                parameter.merge(*args, **kwargs)
            release_weight(parameter)
        return self.base_layer

    def _load_from_state_dict(self, state_dict, prefix: str, *args) -> None:
        inside = f"{prefix}base_layer."
        merged = [name for name, each in self.adapters.items() if each.merged]
        if merged and any(key.startswith(inside) for key in state_dict):
            raise RuntimeError(
                f"the state dict of {prefix}base_layer does not fit: adapters are merged into "
                f"{merged}; call unmerge() first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class AdaptedParameter(AdaptedLayer):
    """The adapters of one parameter W of a module, inside the module's `AdaptedModule`.

    W is (experts, out, in), (experts, in, out) if the module says ``is_transposed = True``, as
    those of transformers do but Llama 4's, which is known by name, or (out, in), one expert. Every
    expert has a lambda and a gamma: ``randlora_lambda`` (experts, r, n) and ``randlora_gamma``
    (experts, n, d). All share the bases.
    """

    # `calibrate` sets it, to see products with W itself and not with W + dW; dW is zero then.
    takes_base_weight = False

    def _set_parameter(self, module: nn.Module, parameter_name: str) -> ParameterSizes:
        """Finds what the module says of its parameter."""
        # In a tuple, because the module is a part of the `AdaptedModule`.
        self._module = (module,)
        self.parameter_name = parameter_name
        sizes = sizes_of(module, parameter_name)
        self.transposed = sizes.transposed
        self.experts = (sizes.experts,)
        return sizes

    def get_base_layer(self) -> nn.Module:
        """The module that has the parameter."""
        return self._module[0]

    def _base_weight(self) -> Tensor:
        return getattr(self.get_base_layer(), self.parameter_name)

    def adapted_weight(self) -> Tensor | None:
        """W + dW of the active adapters in the dtype of W; None if there are none to add."""
        names = [] if self.takes_base_weight else self._prepare_adapters()
        if not names:
            return None
        if self._uncalibrated:
            warn_if_uncalibrated(self, names)
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
        input_scale = self._input_scale(name, lam.device)
        arguments = hadamard.basis_arguments(
            basis, lam.device, self.scaling[name], lam.dtype, input_scale
        )
        # To the operator a transposed weight is that of a layer in the other direction.
        arguments["expand"] = basis.expand != self.transposed
        return hadamard.weight(stack, lam, gam, **arguments).view(shape)

    def _delta(self, name: str, dtype: torch.dtype) -> Tensor:
        diagonals = self._diagonals(name, self.randlora_lambda[name].device)
        delta = self._plus_delta(name, None, *(t.to(dtype) for t in diagonals))
        return laid_out_like(delta, self._base_weight())

    def _name_at(self, path: str) -> str:
        return path.replace(f".{ADAPTERS}.", ".")

    def describe(self, adapter: str) -> str:
        return f"{self.parameter_name} of {self.experts[0]} experts, {super().describe(adapter)}"


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
    if class_name in TRANSPOSED or getattr(module, "is_transposed", False):
        return ParameterSizes(rows, columns, transposed=True, experts=experts)
    return ParameterSizes(columns, rows, transposed=False, experts=experts)


def sizes_of_matching(model: nn.Module, targets: Sequence[str]) -> dict[str, ParameterSizes]:
    """By its name in the base model, the sizes of each parameter that ``target_parameters`` match
    by PEFT's rule: a name equal to one of them, or ending in ``.`` and one of them.

    Raises ValueError if nothing matches, or a parameter that has several names, is cut over ranks,
    whose module is never called, or lies inside another's.
    """
    if not targets:
        return {}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    ends = tuple(f".{name}" for name in targets)
    found = {}
    modules: set[str] = set()
    for path, module in model.named_modules():
        for name_in_module, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{name_in_module}".replace(".base_layer", "")  # as PEFT does
            if not f".{name}".endswith(ends):
                continue
            argument = f"target_parameters: {name!r}"
            check_no_plan(model, name, argument)
            check_is_called(model, path, argument)
            if uses[id(parameter)] > 1:
                raise ValueError(
                    f"{argument} is used under several names, and one would be adapted"
                )
            above = [other for other in modules if path.startswith(f"{other}.")]
            if above:
                raise ValueError(
                    f"{argument} lies inside {above[0]!r}, of which a parameter is a target, too"
                )
            modules.add(path)
            found[name] = sizes_of(module, name_in_module)
    if not found:
        names = [name for name, p in model.named_parameters() if p.dim() == 3]
        raise ValueError(
            f"target_parameters {targets!r} matches no parameter of {type(model).__name__}; those "
            f"of three dimensions are {at_most_ten(names)}"
        )
    return found
