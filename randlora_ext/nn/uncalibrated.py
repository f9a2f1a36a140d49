"""One warning, when training begins, of an adapter that could be calibrated and is not."""

import warnings
import weakref

from torch import Tensor, nn

from .adapted_layer import AdaptedLayer


def warn_when_trained(model: nn.Module, adapter: str) -> None:
    """Has the first backward of a new adapter warn unless it is calibrated by then.

    In language models, where calibration helps, and for adapters on Hadamard bases. A hook on the
    gradient of one lambda does it, and removes itself: compiled code does not contain it, and later
    steps do not pay for it. Copies and FSDP2 make new parameters, which do not have it.
    """
    modules = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    layers = [layer for layer in modules if adapter in layer.randlora_input_scale]
    if not layers or not _reads_tokens(model):
        return
    first = layers[0].randlora_lambda[adapter]
    held = weakref.WeakSet(layers)

    def check(gradient: Tensor) -> None:
        if not any(layer.training for layer in held):
            return
        handle.remove()
        is_new = not bool(first.any())
        if is_new and not any(layer.is_calibrated(adapter) for layer in held):
            warnings.warn(
                f"RandLoRA adapter {adapter!r} is trained without calibration, so the model will "
                "forget more of what it knows. Before the first step call "
                "randlora_ext.calibrate(model, batches), or give transformers' Trainer "
                "callbacks=[randlora_ext.CalibrateCallback()]. To train without it, silence this: "
                'warnings.filterwarnings("ignore", message="RandLoRA adapter")',
                stacklevel=2,
            )

    was = first.requires_grad
    first.requires_grad_(True)  # an adapter that is not active yet has no gradient
    handle = first.register_hook(check)
    first.requires_grad_(was)


def _reads_tokens(model: nn.Module) -> bool:
    get = getattr(model, "get_input_embeddings", None)
    if get is None:
        return any(isinstance(module, nn.Embedding) for module in model.modules())
    try:
        return isinstance(get(), nn.Embedding)  # a vision model's is a convolution
    except NotImplementedError:
        return False
