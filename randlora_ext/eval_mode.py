"""Eval mode for a while, and no cache."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside it the model is in eval mode; afterwards each module is in its old mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for module in _of_four_bits(model):
            module.training = True
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Beside a cache, transformers does not tell packed texts apart by their positions."""
    with ExitStack() as held:
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "use_cache", False):
                held.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = False
        yield


def _of_four_bits(model: nn.Module) -> Iterator[nn.Module]:
    """Layers of bitsandbytes that compute the same in both modes, but in eval mode on a CPU change
    the order of their weight, after which they cannot train."""
    bnb = sys.modules.get("bitsandbytes")  # without it nothing can be its layer
    if bnb is not None:
        yield from (m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
