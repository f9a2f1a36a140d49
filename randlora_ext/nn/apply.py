"""RandLoRA on a whole model without PEFT: `apply_randlora`, `merge_and_unload`, `unload`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..checks import at_most_ten, check_model, meant_targets, warn_of_unmatched
from .adapted_layer import layers_by_name
from .base_layer import (
    check_base_layer,
    check_is_called,
    check_no_plan,
    disable_nested_tensors,
    is_conv1d,
)
from .experts import ParameterPlace, RandLoraParameter, matching_parameters
from .linear import RandLoraLinear
from .merging import check_mergeable, forget_merged, warn_of_shared
from .state_dict import guard
from .uncalibrated import warn_when_trained


def apply_randlora(
    model: nn.Module,
    target_modules: Sequence[str] | str = (),
    modules_to_save: Sequence[str] = (),
    target_parameters: Sequence[str] = (),
    **layer_options: Any,
) -> nn.Module:
    """Replaces the targeted linear layers of `model`, in place, by `RandLoraLinear`; returns it.

    Args:
        target_modules: as in PEFT, a list of names, each matching modules of that name or ending
            in ``.name``; or a regular expression that must match a module's whole name; or
            "all-linear", every nn.Linear and Conv1D except the output embeddings of a transformers
            model and the projection inside nn.MultiheadAttention.
        modules_to_save: names, as in the list, of modules to train whole, such as a new head.
            Nothing inside them is adapted, and `save_adapter` writes them, too. They must have no
            buffers that a state dict holds (running statistics).
        target_parameters: names, as in the list, of parameters to adapt, such as the fused experts
            "experts.gate_up_proj" (`RandLoraParameter`).
        **layer_options: r, randlora_alpha, density, seed, randlora_dropout, adapter_name, basis of
            `RandLoraLinear`.

    Everything but lambda, gamma and `modules_to_save` is frozen. Layers of one shape share one
    packed basis. A second call may give other layers other options; what the first made or left
    trainable stays so. Warns of names that match nothing beside others that match.

    Raises, and leaves the model as it was: ValueError if nothing matches, or a match is never
    called, lies inside an adapted layer, or is spread over ranks; TypeError if a match is not an
    nn.Linear or Conv1D, or is adapted already, or an argument holds no names. Also the errors of
    `RandLoraLinear`.
    """
    check_model(model)
    whole = _modules_to_save(model, modules_to_save)
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        linear = _all_linear(model)
    else:
        linear = matching_modules(model, target_modules)
    all_parameters = matching_parameters(model, target_parameters)
    inside = tuple(f"{name}." for name in whole)
    linear = {name: m for name, m in linear.items() if not f"{name}.".startswith(inside)}
    parameters = {name: p for name, p in all_parameters.items() if not name.startswith(inside)}
    if not linear and (target_modules or not parameters):
        names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        hint = meant_targets(target_modules, names)
        raise ValueError(
            f"target_modules {target_modules!r} matches no module of {type(model).__name__} that "
            f"is not adapted yet{hint}; its linear layers are called {at_most_ten(names)}"
        )
    _warn_of_unmatched(model, target_modules, target_parameters, all_parameters)
    trained = [parameter for module in whole.values() for parameter in module.parameters()]
    why = f", matched by target_modules {target_modules!r},"
    layers = prepare_layers(model, linear, why, parameters, **layer_options)
    put_in(model, layers, trained, layer_options.get("adapter_name", "default"))
    return model


def _modules_to_save(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Those that the argument modules_to_save names; TypeError if it is no list, ValueError if one
    cannot be trained whole."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"modules_to_save must be a list of names, got {names!r}")
    found: dict[str, nn.Module] = {}
    for name in names:
        matches = matching_modules(model, [name])
        if not matches:
            raise ValueError(
                f"modules_to_save must list names of modules in the {type(model).__name__}, got "
                f"{name!r}"
            )
        found |= matches
    for name, module in found.items():
        argument = f"{name!r} of modules_to_save"
        check_not_nested(model, name, argument)
        if adapted_layers(module) or not all(p.is_floating_point() for p in module.parameters()):
            raise ValueError(f"{argument} is adapted or not floating point")
        buffers = module.state_dict().keys() - dict(module.named_parameters()).keys()
        if buffers:
            raise ValueError(
                f"{argument} has buffers, {at_most_ten(sorted(buffers))}, and `save_adapter` "
                "writes parameters only; train it beside and save it yourself"
            )
    return found


def _warn_of_unmatched(
    model: nn.Module,
    target_modules: Sequence[str] | str,
    target_parameters: Sequence[str],
    parameters: Iterable[str],
) -> None:
    class_name = type(model).__name__
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    warn_of_unmatched("target_modules", target_modules, modules, f"module of {class_name}")
    parameter_of = f"parameter of {class_name}"
    warn_of_unmatched("target_parameters", target_parameters, parameters, parameter_of)


def prepare_layers(
    model: nn.Module,
    linear: Mapping[str, nn.Module],
    why: str,
    parameters: Mapping[str, ParameterPlace],
    **layer_options: Any,
) -> dict[str, RandLoraLinear]:
    """Makes adapted layers for `put_in`, and leaves the model as it is. Raises as `apply_randlora`.

    Args:
        linear: the modules to adapt, by their names.
        why: follows a module's name in error messages, such as ", matched by target_modules ...,".
        parameters: those to adapt, as `matching_parameters` gives them.
    """
    _check_targets(model, linear, why, parameters)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        layers = _new_layers(model, linear, parameters, **layer_options)
        warn_of_shared(model, layers)
    finally:  # a new layer has frozen its base layer
        for parameter in trained:
            parameter.requires_grad_(True)
    return layers


def put_in(
    model: nn.Module,
    layers: Mapping[str, RandLoraLinear],
    trained: Iterable[nn.Parameter],
    adapter_name: str,
) -> None:
    """Puts the layers of `prepare_layers` into the model, freezes what they adapt, or the whole
    model if they are its first, and makes the parameters `trained` trainable."""
    if not adapted_layers(model):
        model.requires_grad_(False)
    outermost: dict[str, RandLoraLinear] = {}  # of each module with parameters the last layer
    for name, layer in layers.items():
        layer._freeze_base()
        if isinstance(layer, RandLoraParameter):
            outermost[name.rpartition(".")[0]] = layer
        else:
            model.set_submodule(name, layer)
            disable_nested_tensors(model, name)
    for parameter in trained:
        parameter.requires_grad_(True)
    for path, layer in reversed(outermost.items()):  # inner modules first
        model.set_submodule(path, layer)
    guard(model)
    warn_when_trained(model, adapter_name)


def _new_layers(
    model: nn.Module,
    linear: Mapping[str, nn.Module],
    parameters: Mapping[str, ParameterPlace],
    **layer_options: Any,
) -> dict[str, RandLoraLinear]:
    """The layers for these targets, which know their paths but do not lie in the model yet."""
    made: dict[str, RandLoraLinear] = {}
    over: dict[nn.Module, RandLoraLinear] = {}  # by the module that it adapts
    for name, module in linear.items():  # a tied one has several names
        if module not in over:
            over[module] = RandLoraLinear(module, **layer_options)
        made[name] = over[module]
    for name, place in parameters.items():
        module = model.get_submodule(place.module)
        base = over.get(module, module)  # another parameter of it is adapted, too
        over[module] = RandLoraParameter(base, place.name, **layer_options)
        made[name] = over[module]
    for name, layer in made.items():
        layer.path = name
    return made


def _check_targets(
    model: nn.Module,
    linear: Mapping[str, nn.Module],
    why: str,
    parameters: Mapping[str, ParameterPlace],
) -> None:
    """ValueError or TypeError for what cannot be adapted; arguments as of `prepare_layers`."""
    for name, module in linear.items():
        argument = f"module {name!r}{why}"
        check_base_layer(module, argument)
        check_no_plan(model, name, argument)
        check_is_called(model, name, argument)
        check_not_nested(model, name, argument)
    for name, place in parameters.items():
        check_not_nested(model, name, f"parameter {name!r}")
        if place.module in linear:
            raise ValueError(
                f"parameter {name!r} is of module {place.module!r}, which is matched, too"
            )


def check_not_nested(model: nn.Module, name: str, argument: str) -> None:
    """Raises ValueError, naming `argument`, if module `name` lies inside an adapted layer."""
    names = name.split(".")
    for depth in range(len(names)):
        above = ".".join(names[:depth])
        if hasattr(model.get_submodule(above), "update_layer"):
            raise ValueError(
                f"{argument} lies inside {above or 'the model'!r}, which is adapted already, and "
                "adapters cannot be nested; update_layer(name, ...) adds one beside the first"
            )


def matching_modules(model: nn.Module, targets: Sequence[str] | str) -> dict[str, nn.Module]:
    """By their paths, the modules that ``target_modules`` names; TypeError or ValueError if it is
    neither names nor a regular expression."""
    named = dict(model.named_modules(remove_duplicate=False))
    named.pop("", None)  # the model itself
    if isinstance(targets, str):
        try:
            expression = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"target_modules {targets!r} is no regular expression: {error}"
            ) from error
        return {name: module for name, module in named.items() if expression.fullmatch(name)}
    if not isinstance(targets, Iterable) or not all(isinstance(name, str) for name in targets):
        raise TypeError(f"target_modules must be names or a regular expression, got {targets!r}")
    ends = tuple(f".{name}" for name in targets)
    return {name: module for name, module in named.items() if f".{name}".endswith(ends)}


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
    Adapters that are not active are dropped. Returns `model`, or its base layer if it is a
    `RandLoraLinear` itself. Raises as `RandLoraLinear.merge`, or RuntimeError if two layers share a
    weight, before anything changes. Warns if a module without an adapter shares the weight of a
    layer, as an embedding tied to the head: it changes, too. Source: PEFT's method.
    """
    layers = adapted_layers(model)
    check_mergeable(layers)
    modules = model.named_modules(remove_duplicate=False)
    by_path = {path: module for path, module in modules if isinstance(module, RandLoraLinear)}
    warn_of_shared(model, by_path)
    for layer in layers.values():
        names = layer._adapters_to_add()
        if names:
            layer.merge(adapter_names=names, keep_weight="nothing")
    return _without(model)


def unload(model: nn.Module) -> nn.Module:
    """Like `merge_and_unload`, but drops all adapters; merged ones are unmerged first."""
    for layer in adapted_layers(model).values():
        layer.disable()
    return _without(model)


def adapted_layers(model: nn.Module) -> dict[str, RandLoraLinear]:
    """Our layers without PEFT, as `layers_by_name` names them."""
    layers = layers_by_name(model)
    return {name: layer for name, layer in layers.items() if isinstance(layer, RandLoraLinear)}


def _without(model: nn.Module) -> nn.Module:
    for layer in adapted_layers(model).values():
        forget_merged(layer)
    if isinstance(model, RandLoraLinear):
        return model.get_base_layer()
    # Listed before anything is replaced, inner ones first; a tied layer has several names.
    for name, module in reversed(list(model.named_modules(remove_duplicate=False))):
        if isinstance(module, RandLoraLinear):
            model.set_submodule(name, module.base_layer)
    guard(model)
    return model
