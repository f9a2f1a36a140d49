"""`apply_randlora`: RandLoRA on a whole model for those without PEFT."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from .base_layer import check_base_layer
from .layer import RandLoraLinear
from .state import refuse_misfit


def apply_randlora(
    model: nn.Module, target_modules: Sequence[str] | str, **layer_options: Any
) -> nn.Module:
    """Replaces the targeted linear layers of `model`, in place, by `RandLoraLinear`; returns it.

    Args:
        target_modules: a list of names, each matching modules called so or ending in ``.name``; or
            a string, a regular expression that must match a module's whole name. As in PEFT.
        **layer_options: r, randlora_alpha, density, projection_prng_key, randlora_dropout,
            adapter_name, support of `RandLoraLinear`.

    Everything but lambda and gamma is frozen. Layers of one shape share one packed basis. A second
    call may give other layers other options; what the first made stays as it is.

    Raises:
        ValueError: where nothing matches. TypeError: where a match is no nn.Linear or Conv1D. And
            what RandLoraLinear raises. In all cases the model is as it was.
    """
    if isinstance(target_modules, str):
        pattern = re.compile(target_modules)

        def is_target(name: str) -> bool:
            return pattern.fullmatch(name) is not None
    else:
        exact, suffixes = set(target_modules), tuple("." + name for name in target_modules)

        def is_target(name: str) -> bool:
            return name in exact or name.endswith(suffixes)

    # A module that is registered twice (tied) is visited twice, and must be wrapped once.
    matches = {n: m for n, m in model.named_modules(remove_duplicate=False) if n and is_target(n)}
    if not matches:
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise ValueError(
            f"target_modules {target_modules!r} matches no module of {type(model).__name__}; its "
            f"linear layers are called {linear[:10]}{' ...' if len(linear) > 10 else ''}"
        )
    for name, module in matches.items():
        check_base_layer(module, f"module {name!r}, matched by target_modules {target_modules!r},")
    # Options can only be wrong at the first layer, before it freezes anything.
    unique = {id(module): module for module in matches.values()}
    wrapped = {key: RandLoraLinear(module, **layer_options) for key, module in unique.items()}
    layers = [m for m in model.modules() if isinstance(m, RandLoraLinear)]
    adapters = {id(p) for layer in layers for p in layer.adapter_parameters()}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)
    for name, module in matches.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapped[id(module)])
    # Of all layers before the first of them takes anything; a second call need not add it again.
    hooks = model._load_state_dict_pre_hooks.values()
    if refuse_misfit not in (getattr(hook, "hook", None) for hook in hooks):
        model.register_load_state_dict_pre_hook(refuse_misfit)
    return model
