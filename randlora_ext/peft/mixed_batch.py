"""Mixed batches: ``model(..., adapter_names=[...])``, one adapter per row of the batch."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import AcceleratedLayer


@contextmanager
def adapter_per_row(tuner: nn.Module, names: list[str], call: dict) -> Iterator[None]:
    """Layers called inside compute row b of their input with adapter ``names[b]``.

    Equivalent to running every row alone with its adapter active; "__base__" means none. PEFT has
    this for LoRA. modules_to_save are switched as well.

    Args:
        call: the keyword arguments of the model's call. ``generate`` repeats every input
            max(num_beams, num_return_sequences) times, but not in the encoder of a T5.

    Raises ValueError in training mode and for unknown names, before anything is computed.
    """
    if tuner.training:
        raise ValueError("adapter_names cannot be given in training mode; call model.eval()")
    layers = [module for module in tuner.modules() if isinstance(module, AcceleratedLayer)]
    known = {name for layer in layers for name in layer.randlora_lambda}
    if unknown := sorted(set(names) - known - {"__base__"}):
        raise ValueError(f"adapter_names has unknown {unknown}; known are {sorted(known)}")
    config = call.get("generation_config")
    counts = (
        call.get(name, getattr(config, name, None))
        for name in ("num_beams", "num_return_sequences")
    )
    copies = max((count for count in counts if isinstance(count, int)), default=1)

    def give_names(module, args, kwargs):
        inputs = args[0] if args else next(iter(kwargs.values()))
        repeated = len(inputs) == copies * len(names)
        each = [name for name in names for _ in range(copies)] if repeated else names
        return args, {**kwargs, "adapter_names": each}

    wrappers = [m for m in tuner.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    hooks = [
        module.register_forward_pre_hook(give_names, with_kwargs=True)
        for module in layers + wrappers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
