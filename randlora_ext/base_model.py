"""A model with adapters, computed as if it had none."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .nn.linear import RandLoraLinear


@contextmanager
def base_of(model: nn.Module) -> Iterator[None]:
    """Inside it the model computes what it does without adapters."""
    with ExitStack() as held:
        for part in peft_models(model):
            held.enter_context(_disabled(part))
        for layer in layers_without_peft(model):
            held.callback(setattr, layer, "disabled", layer.disabled)
            layer.disabled = True
        yield


def peft_models(model: nn.Module) -> list[nn.Module]:
    """The model itself, or what wrappers such as DistributedDataParallel hold."""
    return [module for module in model.modules() if hasattr(type(module), "disable_adapter")]


def layers_without_peft(model: nn.Module) -> list[RandLoraLinear]:
    return [module for module in model.modules() if isinstance(module, RandLoraLinear)]


@contextmanager
def _disabled(model: Any) -> Iterator[None]:
    """PEFT's own context makes every parameter of an active adapter trainable, at its end, even one
    that was frozen; this one gives them back as they were."""
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, did in trains.items():
            parameter.requires_grad_(did)
