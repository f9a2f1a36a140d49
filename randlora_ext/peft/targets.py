"""Which modules of a model a configuration means: checks before anything is drawn or replaced."""

from collections.abc import Iterable, Mapping

import peft
from peft.tuners.randlora.layer import RandLoraLayer
from torch import nn

from ..checks import at_most_ten, warn_user
from ..nn.base_layer import check_no_plan, check_whole, is_conv1d
from ..nn.experts import sizes_of_matching
from ..nn.linear import RandLoraLinear
from .config import target_parameters
from .quantized import backend_of

# PEFT adds these names to ``modules_to_save`` of classifiers, of which each has one.
_SAVED_ANYWAY = {"classifier", "score", "qa_outputs"}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module) or bool(backend_of(module))


def check_target(target: nn.Module) -> None:
    """Raises ValueError unless it is a linear layer."""
    if not is_linear(target):
        raise ValueError(
            f"Target module {target} is not supported: it is no nn.Linear, no Conv1D of "
            "transformers and no quantized linear layer"
        )


def check_targets(
    model: nn.Module, config: peft.RandLoraConfig, targets: Mapping[str, nn.Module]
) -> None:
    """Raises ValueError if the configuration names nothing that can be adapted, or something that
    cannot, or the model has adapters without PEFT; warns of names that match nothing, and of a
    ``layers_to_transform`` that PEFT would ignore.

    Args:
        targets: by name, the modules that ``target_modules`` match.
    """
    for name, module in model.named_modules():
        if isinstance(module, RandLoraLinear):
            raise ValueError(
                f"module {name!r} is a RandLoraLinear: adapt all layers by PEFT, or all without it"
            )
    parameters = sizes_of_matching(model, target_parameters(config))
    if not any(map(is_linear, targets.values())) and (config.target_modules or not parameters):
        _refuse_unmatched(model, config)
    for target in targets.values():
        check_target(target)
    _warn_of_unmatched(model, config, parameters)
    for name, target in targets.items():
        check_no_plan(model, name, f"target {name!r}")
        if not isinstance(target, RandLoraLayer):
            check_whole(getattr(target, "weight", None), f"target {name!r}")


def _refuse_unmatched(model: nn.Module, config: peft.RandLoraConfig) -> None:
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    if "" in linear:
        raise ValueError("the model is itself a linear layer; put it into an nn.Sequential")
    unadapted = [name for name in linear if not name.endswith(".base_layer")]
    layers = config.layers_to_transform
    where = "" if layers in (None, []) else f" in layers_to_transform {layers!r}"
    raise ValueError(
        f"target_modules {config.target_modules!r} matches no linear layer of "
        f"{type(model).__name__}{where}; its linear layers are called {at_most_ten(unadapted)}"
    )


def _warn_of_unmatched(
    model: nn.Module, config: peft.RandLoraConfig, parameters: Iterable[str]
) -> None:
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    saved = set(config.modules_to_save or ()) - _SAVED_ANYWAY
    # PEFT looks for these without a dot before them.
    saved = {name for name in saved if not any(path.endswith(name) for path in modules)}
    of_model = f"of {type(model).__name__}"
    for field, targets, names, kind in (
        ("target_modules", config.target_modules, modules, "module"),
        ("target_parameters", target_parameters(config), parameters, "parameter"),
        ("modules_to_save", saved, modules, "module"),
    ):
        # A text is a regular expression, which has matched.
        unmatched = [] if isinstance(targets, str) else _unmatched(targets or (), names)
        if unmatched:
            warn_user(f"{field} that match no {kind} {of_model}: {', '.join(unmatched)}")
    if isinstance(config.target_modules, str) and config.layers_to_transform not in (None, []):
        warn_user(
            f"layers_to_transform {config.layers_to_transform!r} does nothing beside "
            f"target_modules {config.target_modules!r}: PEFT takes all layers that a text matches"
        )


def _unmatched(targets: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those that are no name, nor the end of one, ``.target``."""
    dotted = [f".{name}" for name in names]
    return sorted(t for t in set(targets) if not any(name.endswith(f".{t}") for name in dotted))
