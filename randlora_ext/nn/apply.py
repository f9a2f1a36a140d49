"""RandLoRA on a whole model without PEFT: `apply_randlora`, `merge_and_unload`, `unload`."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..checks import check_model, meant_targets, warn_of_unmatched
from .adapted_layer import layers_by_path
from .base_layer import (
    check_base_layer,
    check_is_called,
    check_no_plan,
    disable_nested_tensors,
    first,
    is_conv1d,
)
from .experts import RandLoraParameter, matching_parameters
from .linear import RandLoraLinear
from .merging import forget_merged
from .paths import in_base_model
from .shared import check_mergeable, warn_of_shared
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
    nn.Linear or Conv1D, or is adapted already. Also the errors of `RandLoraLinear`.
    """
    check_model(model)
    whole: dict[str, nn.Module] = {}
    model_class = type(model).__name__
    for name in modules_to_save:
        if isinstance(modules_to_save, str) or not (found := _matching(model, [name])):
            raise ValueError(
                f"modules_to_save must list names of modules in the {model_class}, got {name!r}"
            )
        whole |= found
    for name, module in whole.items():
        check_not_nested(model, name, f"{name!r} of modules_to_save")
        if adapted_layers(module) or not all(p.is_floating_point() for p in module.parameters()):
            raise ValueError(f"{name!r} of modules_to_save is adapted or not floating point")
        if buffers := module.state_dict().keys() - dict(module.named_parameters()).keys():
            raise ValueError(
                f"{name!r} of modules_to_save has buffers, {first(sorted(buffers))}, and "
                "`save_adapter` writes parameters only; train it beside and save it yourself"
            )
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        matches = _all_linear(model)
    else:
        matches = _matching(model, target_modules)
    inside = tuple(f"{name}." for name in whole)
    matches = {name: m for name, m in matches.items() if not f"{name}.".startswith(inside)}
    found_parameters = matching_parameters(model, target_parameters)
    stacks = {name: at for name, at in found_parameters.items() if not name.startswith(inside)}
    if not matches and (target_modules or not stacks):
        linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        hint = meant_targets(target_modules, linear)
        raise ValueError(
            f"target_modules {target_modules!r} matches no module of {model_class} that is not "
            f"adapted yet{hint}; its linear layers are called {first(linear)}"
        )
    modules = (name for name, _ in model.named_modules(remove_duplicate=False))
    warn_of_unmatched("target_modules", target_modules, modules, f"module of {model_class}")
    parameters_of = f"parameter of {model_class}"
    warn_of_unmatched("target_parameters", target_parameters, found_parameters, parameters_of)
    parameters = [p for module in whole.values() for p in module.parameters()]
    why = f", matched by target_modules {target_modules!r},"
    with adapting(model, matches, parameters, why, stacks, **layer_options):
        return model


@contextmanager
def adapting(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    trained: Iterable[nn.Parameter],
    why: str,
    stacks: Mapping[str, tuple[str, str]],
    **layer_options: Any,
) -> Iterator[dict[str, RandLoraLinear]]:
    """Makes adapted layers, which take their places in the model when the block ends.

    If it raises, the model is as it was. Otherwise as `apply_randlora`.

    Args:
        targets: the modules to adapt, by their names.
        trained: parameters to train whole.
        why: follows a module's name in error messages, such as ", matched by target_modules ...,".
        stacks: the parameters to adapt, as `matching_parameters` gives them.
    """
    _check_targets(model, targets, why, stacks)
    before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        wrapped = {m: RandLoraLinear(m, **layer_options) for m in dict.fromkeys(targets.values())}
        made = {name: wrapped[module] for name, module in targets.items()}
        outermost: dict[str, Any] = {}
        for name, (path, own) in stacks.items():
            base = outermost.get(path) or model.get_submodule(path)
            made[name] = outermost[path] = RandLoraParameter(base, own, **layer_options)
        for name, layer in made.items():
            layer.path = name
        warn_of_shared(model, made)
        yield made
    except BaseException:  # the layers have frozen their base layers
        for parameter in before:
            parameter.requires_grad_(True)
        raise
    if not adapted_layers(model):
        model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    for name in targets:
        model.set_submodule(name, made[name])
        disable_nested_tensors(model, name)
    for path, layer in reversed(outermost.items()):  # inner modules first
        model.set_submodule(path, layer)
    guard(model)
    warn_when_trained(model, layer_options.get("adapter_name", "default"))


def _check_targets(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    why: str,
    stacks: Mapping[str, tuple[str, str]],
) -> None:
    """ValueError or TypeError for what cannot be adapted; the arguments are those of `adapting`."""
    for name, module in targets.items():
        check_base_layer(module, f"module {name!r}{why}")
        check_no_plan(model, name, f"module {name!r}{why}")
        check_is_called(model, name, f"module {name!r}{why}")
        check_not_nested(model, name, f"module {name!r}{why}")
    for name, (path, _) in stacks.items():
        check_not_nested(model, name, f"parameter {name!r}")
        if path in targets:
            raise ValueError(f"parameter {name!r} is of module {path!r}, which is matched, too")


def check_not_nested(model: nn.Module, name: str, argument: str) -> None:
    """Raises ValueError, naming `argument`, if module `name` lies inside an adapted layer."""
    parts = name.split(".")
    for above in (".".join(parts[:depth]) for depth in range(len(parts))):
        if hasattr(model.get_submodule(above), "update_layer"):
            raise ValueError(
                f"{argument} lies inside {above or 'the model'!r}, which is adapted already, and "
                "adapters cannot be nested; update_layer(name, ...) adds one beside the first"
            )


def _matching(model: nn.Module, targets: Sequence[str] | str) -> dict[str, nn.Module]:
    if isinstance(targets, str):
        try:
            is_target: Any = re.compile(targets).fullmatch
        except re.error as error:
            raise ValueError(
                f"target_modules {targets!r} is no regular expression: {error}"
            ) from error
    elif isinstance(targets, Iterable) and all(isinstance(name, str) for name in targets):
        suffixes = tuple(f".{name}" for name in targets)
        is_target = lambda name: f".{name}".endswith(suffixes)  # noqa: E731
    else:
        raise TypeError(f"target_modules must be names or a regular expression, got {targets!r}")
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if name and is_target(name)}


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
    at = {path: module for path, module in modules if isinstance(module, RandLoraLinear)}
    warn_of_shared(model, at)
    for layer in layers.values():
        if names := layer._names():
            layer.merge(adapter_names=names, keep_weight="nothing")
    return _without(model)


def unload(model: nn.Module) -> nn.Module:
    """Like `merge_and_unload`, but drops all adapters; merged ones are unmerged first."""
    for layer in adapted_layers(model).values():
        layer.disable()
    return _without(model)


def adapted_layers(model: nn.Module, layer_class: type[Any] = RandLoraLinear) -> dict[str, Any]:
    """By their paths, and those of parameters by the names of these; a tied one several times."""
    layers = layers_by_path(model)
    wanted = {path: layer for path, layer in layers.items() if isinstance(layer, layer_class)}
    return {layer.name_at(in_base_model(path, layers)): layer for path, layer in wanted.items()}


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
