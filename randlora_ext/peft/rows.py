"""Batches whose rows have adapters of their own: ``model(..., adapter_names=[...])``."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper

from .layer import AcceleratedLinear, AcceleratedParameter


@contextmanager
def adapters_by_row(
    model: BaseTuner, adapter_names: Sequence[str], call: Mapping[str, Any]
) -> Iterator[None]:
    """Within it, row b is computed with adapter_names[b]; "__base__" means none.

    ``generate`` repeats every input max(num_beams, num_return_sequences) times, but not in the
    encoder of a T5. Raises ValueError before anything is computed.

    Args:
        call: the keyword arguments of the model's call.
    """
    if model.training:
        raise ValueError("adapter_names cannot be given in training mode; call model.eval()")
    take_names = AcceleratedLinear, AuxiliaryTrainingWrapper
    modules = [module for module in model.modules() if isinstance(module, take_names)]
    if any(isinstance(m, AcceleratedParameter) for m in modules):
        raise ValueError(
            "adapter_names cannot choose among adapters of target_parameters: one W + dW "
            "serves the whole batch"
        )
    known = {name for m in modules for name in getattr(m, "randlora_lambda", ())}
    unknown = sorted(set(adapter_names) - known - {"__base__"})
    if unknown:
        raise ValueError(f"adapter_names has unknown {unknown}; known are {sorted(known)}")
    configs = call.get("generation_config"), getattr(model.model, "generation_config", None)

    def chosen(name: str) -> int:
        values = call.get(name), *(getattr(config, name, None) for config in configs)
        return next(filter(None, values), 1)

    copies = max(chosen("num_beams"), chosen("num_return_sequences"))

    thread = threading.get_ident()

    def give_names(module, args, kwargs=None):
        # Another thread has other rows, and may call while this hook is being registered. Compiled
        # code cannot ask for its thread.
        if not torch.compiler.is_compiling() and threading.get_ident() != thread:
            return None
        inputs = args[0] if args else next(iter(kwargs.values()))
        times = copies if len(inputs) == copies * len(adapter_names) else 1
        each = [name for name in adapter_names for _ in range(times)]
        if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT's, which wants all adapters
            each = [name if name in module._adapters else "__base__" for name in each]
        return args, {**kwargs, "adapter_names": each}

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(give_names, with_kwargs=True))
            if isinstance(module, AcceleratedLinear):
                module._rows = tuple(adapter_names)
                hooks.callback(setattr, module, "_rows", None)
        yield
