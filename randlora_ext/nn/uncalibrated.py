"""One warning, when training begins, of an adapter that could be calibrated and is not."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..checks import warn_user


def watch_calibration(model: nn.Module, adapter: str) -> None:
    """Marks one layer that has the new adapter, whose forward warns if it is trained uncalibrated.
    Does nothing unless the model reads tokens: elsewhere calibration was not seen to help."""
    if not _reads_tokens(model):
        return
    module: Any
    for module in model.modules():
        if adapter in getattr(module, "randlora_input_scale", ()):
            module._uncalibrated = module._uncalibrated | {adapter}
            return


def warn_if_uncalibrated(layer: Any, names: Sequence[str]) -> None:
    """Called in forward of an `AdaptedLayer`. In the first one that trains an adapter of
    ``layer._uncalibrated``, it warns if that is new and not calibrated; once it has seen numbers it
    does not look again. Compiled code does not look at all."""
    if torch.compiler.is_compiling() or not layer.training or not torch.is_grad_enabled():
        return
    for name in names:
        lam = layer.randlora_lambda[name]
        if name not in layer._uncalibrated or not lam.requires_grad:
            continue
        # A later adapter of that name may have bases that cannot be calibrated.
        needs_none = name not in layer.randlora_input_scale
        try:
            needless = needs_none or bool(lam.any()) or layer.is_calibrated(name)
        except RuntimeError:  # no numbers to look at: on the meta device, fake, or inside vmap
            continue
        layer._uncalibrated = layer._uncalibrated - {name}
        if needless:
            continue
        warn_user(
            f"RandLoRA adapter {name!r} is trained without calibration, so the model will forget "
            "more of what it knows. Before the first step call randlora_ext.calibrate(model, "
            "batches), or with a Trainer of transformers "
            "trainer.add_callback(randlora_ext.ForgettingBudget(trainer)). "
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
