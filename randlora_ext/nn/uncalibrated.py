"""One warning, when training begins, of an adapter that could be calibrated and is not."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..checks import warn_user

if TYPE_CHECKING:
    from .adapted_layer import AdaptedLayer


def watch_calibration(layers: Sequence["AdaptedLayer"], model: nn.Module, adapter: str) -> None:
    """Has the first of these layers of a language model, where calibration helps, look at a new
    adapter when it is trained, if the adapter is on Hadamard bases."""
    calibratable = [layer for layer in layers if adapter in layer.randlora_input_scale]
    if calibratable and _reads_tokens(model):
        calibratable[0].watches_calibration = True


def warn_if_uncalibrated(layer: "AdaptedLayer", names: Sequence[str]) -> None:
    """Called in forward. In the first one that trains these adapters, it warns if one is new and
    not calibrated; it does not look again. Compiled code does not look at all."""
    if torch.compiler.is_compiling() or not layer.training or not torch.is_grad_enabled():
        return
    trained = [name for name in names if layer.randlora_lambda[name].requires_grad]
    if not trained:
        return
    layer.watches_calibration = False
    for name in trained:
        if name not in layer.randlora_input_scale or layer.is_calibrated(name):
            continue
        if bool(layer.randlora_lambda[name].any()):  # it has trained already
            continue
        warn_user(
            f"RandLoRA adapter {name!r} is trained without calibration, so the model will forget "
            "more of what it knows. Before the first step call randlora_ext.calibrate(model, "
            "batches), or give transformers' Trainer callbacks=[randlora_ext.ForgettingBudget()]. "
            "To train without it, silence this: "
            'warnings.filterwarnings("ignore", message="RandLoRA adapter")'
        )


def _reads_tokens(model: nn.Module) -> bool:
    get = getattr(model, "get_input_embeddings", None)
    if get is None:
        return any(isinstance(module, nn.Embedding) for module in model.modules())
    try:
        return isinstance(get(), nn.Embedding)  # a vision model's is a convolution
    except NotImplementedError:
        return False
