"""RandLoRA on a whole model without PEFT: `apply_randlora`, `merge_and_unload`, `unload`."""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from .base_layer import (
    check_base_layer,
    check_mergeable,
    check_no_plan,
    disable_nested_tensors,
    is_conv1d,
)
from .linear import RandLoraLinear, refuse_unknown
from .merging import merged_layers
from .state_dict import guard, unguard


def apply_randlora(
    model: nn.Module, target_modules: Sequence[str] | str, **layer_options: Any
) -> nn.Module:
    """Replaces the targeted linear layers of `model`, in place, by `RandLoraLinear`; returns it.

    Args:
        target_modules: as in PEFT, a list of names, each matching modules of that name or ending
            in ``.name``; or a regular expression that must match a module's whole name; or
            "all-linear", every nn.Linear and Conv1D except the output embeddings of a transformers
            model and the projection inside nn.MultiheadAttention.
        **layer_options: r, randlora_alpha, density, projection_prng_key, randlora_dropout,
            adapter_name, basis of `RandLoraLinear`.

    Everything but lambda and gamma is frozen. Layers of one shape share one packed basis. A second
    call may give other layers other options; what the first made stays as it is.

    Raises:
        ValueError: nothing matches, a match is ``out_proj`` of nn.MultiheadAttention, which torch
            never calls, it lies inside an adapted layer, or tensor parallelism or fully_shard has
            spread its weight over ranks. TypeError: a match is not an nn.Linear
            or Conv1D, or is adapted already; an option has another name. Also the errors of
            RandLoraLinear. In all cases the model is as it was.
    """
    known = inspect.signature(RandLoraLinear).parameters
    refuse_unknown("apply_randlora", layer_options, [*known][1:])
    # A module that is registered twice (tied) is visited twice, and must be wrapped once.
    named = dict(model.named_modules(remove_duplicate=False))
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        matches = _all_linear(model)
    else:
        is_target = _matcher(target_modules)
        matches = {name: module for name, module in named.items() if name and is_target(name)}
    if not matches:
        adapted = [name for name, module in named.items() if isinstance(module, RandLoraLinear)]
        linear = [name for name, module in named.items() if type(module) is nn.Linear]
        linear = [name for name in linear if name.rpartition(".")[0] not in adapted]
        raise ValueError(
            f"target_modules {target_modules!r} matches no module of {type(model).__name__} that "
            f"is not adapted yet; its linear layers are called {first(linear)}, those that are "
            f"adapted already {first(adapted)} (update_layer adds another adapter to one)"
        )
    for name, module in matches.items():
        matched = f"module {name!r}, matched by target_modules {target_modules!r},"
        check_base_layer(module, matched)
        check_no_plan(model, name, matched)
        check_is_called(model, name, matched)
        check_not_nested(model, name, matched)
    unique = {id(module): module for module in matches.values()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        wrapped = {key: RandLoraLinear(module, **layer_options) for key, module in unique.items()}
    except BaseException:  # the layers before have frozen their base layers
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    adapters = {id(p) for layer in _layers(model) for p in layer.adapter_parameters()}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)
    for name, module in matches.items():
        wrapped[id(module)].path = name
        _put(model, name, wrapped[id(module)])
        disable_nested_tensors(model, name)
    guard(model)
    return model


def check_is_called(model: nn.Module, name: str, argument: str) -> None:
    """Raises ValueError, naming `argument`, if torch only reads the weight of module `name`."""
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        raise ValueError(
            f"{argument} would not be adapted: nn.MultiheadAttention reads its weight and never "
            "calls it"
        )


def check_not_nested(model: nn.Module, name: str, argument: str) -> None:
    """Raises ValueError, naming `argument`, if module `name` lies inside an adapted layer."""
    parts = name.split(".")
    for above in (".".join(parts[:depth]) for depth in range(len(parts))):
        if hasattr(model.get_submodule(above), "update_layer"):
            raise ValueError(
                f"{argument} lies inside {above or 'the model'!r}, which is adapted already, and "
                "adapters cannot be nested; update_layer(name, ...) adds another one beside the "
                "first"
            )


def first(names: list[str]) -> str:
    """At most ten of them, for an error message."""
    return f"{names[:10]}{' ...' if len(names) > 10 else ''}"


def _matcher(target_modules: Sequence[str] | str) -> Callable[[str], bool]:
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"target_modules {target_modules!r} is no regular expression: {error}"
            ) from error
        return lambda name: pattern.fullmatch(name) is not None
    if not isinstance(target_modules, Iterable) or not all(
        isinstance(name, str) for name in target_modules
    ):
        raise TypeError(
            f"target_modules must be names or a regular expression, got {target_modules!r}"
        )
    exact, suffixes = set(target_modules), tuple("." + name for name in target_modules)
    return lambda name: name in exact or name.endswith(suffixes)


def _all_linear(model: nn.Module) -> dict[str, nn.Module]:
    get_output = getattr(model, "get_output_embeddings", None)
    left_out = {id(get_output())} if get_output is not None else set()
    for module in model.modules():
        if isinstance(module, (RandLoraLinear, nn.MultiheadAttention)):
            left_out |= {id(child) for child in module.modules() if child is not module}
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and id(module) not in left_out and (type(module) is nn.Linear or is_conv1d(module))
    }


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merges the active adapters and replaces every `RandLoraLinear` by its base layer, in place.

    The model is then as it was before `apply_randlora`, with W + dW for W, and still frozen.
    Adapters that are not active are dropped. Source: PEFT's method.

    Returns:
        `model`, or its base layer if it is a `RandLoraLinear` itself.

    Raises:
        TypeError, RuntimeError: as `RandLoraLinear.merge`, or two layers share a weight, before
            anything changes.
    """
    check_mergeable(
        {path: layer for path, layer in model.named_modules() if isinstance(layer, RandLoraLinear)}
    )
    for layer in _layers(model):
        layer._dense_weight()
    for layer in _layers(model):
        names = [name for name in layer.active_adapters if name not in layer.merged_adapters]
        if names and not layer.disabled:
            layer.merge(adapter_names=names, keep_weight="nothing")
    return _without(model)


def unload(model: nn.Module) -> nn.Module:
    """Like `merge_and_unload`, but drops all adapters; merged ones are unmerged first."""
    for layer in _layers(model):
        if layer.merged:
            layer.unmerge()
    return _without(model)


def _layers(model: nn.Module) -> list[RandLoraLinear]:
    return [module for module in model.modules() if isinstance(module, RandLoraLinear)]


def _without(model: nn.Module) -> nn.Module:
    merged_layers.difference_update(_layers(model))
    if isinstance(model, RandLoraLinear):
        return model.base_layer
    # Listed before anything is replaced; a tied layer has several names.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, RandLoraLinear):
            _put(model, name, module.base_layer)
    unguard(model)
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
