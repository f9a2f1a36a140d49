"""`PeftModel`'s methods that save and load, made safe for models on our layers.

The only patch of the package. PEFT has tables for tuners and configurations and calls methods of
both, but only ``save_pretrained`` and ``load_adapter`` know the folder before tensors are written
to it, or read from it over an existing adapter. These two, and ``from_pretrained``, are also where
one rank of a model that transformers has sharded may fail alone. Models on other layers pass
through, and so does ``from_pretrained`` for unsharded ones.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft import PeftModel

from .loading import check_load_over
from .model import AcceleratedRandLoraModel, parallel_plans
from .saving import save_together

_patched: dict[str, tuple[Callable, Callable]] = {}  # (PEFT's, ours)


def install() -> None:
    """Wraps the methods, once."""
    for name, around in (
        ("save_pretrained", _for_our_models(_save)),
        ("load_adapter", _for_our_models(_load)),
        ("from_pretrained", _from_pretrained),
    ):
        if name not in _patched:
            stock = PeftModel.__dict__[name]
            ours = around(stock)
            _patched[name] = stock, ours
            setattr(PeftModel, name, ours)


def uninstall() -> None:
    """Puts PEFT's own back, unless somebody else has wrapped ours since."""
    for name, (stock, ours) in list(_patched.items()):
        if PeftModel.__dict__.get(name) is ours:
            setattr(PeftModel, name, stock)
            del _patched[name]


def _for_our_models(around: Callable) -> Callable:
    def patched(stock: Callable) -> Callable:
        @functools.wraps(stock)
        def method(self, *args, **kwargs):
            if isinstance(self.base_model, AcceleratedRandLoraModel):
                return around(stock, self, *args, **kwargs)
            return stock(self, *args, **kwargs)

        return method

    return patched


def _save(
    stock: Callable, model: PeftModel, save_directory, *args, state_dict=None, **kwargs
) -> None:
    def save(folder: str, **state) -> None:
        stock(model, folder, *args, **state, **kwargs)

    is_main_process = kwargs.get("is_main_process", True)
    save_together(save, model, save_directory, is_main_process, state_dict)


def _load(stock: Callable, model: PeftModel, model_id, adapter_name, *args, **kwargs):
    with _failing_together(model.base_model.model):
        # A new adapter takes its configuration from the file; one that is there keeps its own.
        if adapter_name in model.peft_config:
            with _failing_together(model.base_model.model):  # before any rank has changed
                check_load_over(model, model_id, adapter_name, kwargs)
        return stock(model, model_id, adapter_name, *args, **kwargs)


def _from_pretrained(stock: classmethod) -> classmethod:
    @functools.wraps(stock.__func__)
    def method(cls, model, *args, **kwargs):
        with _failing_together(model):
            return stock.__get__(None, cls)(model, *args, **kwargs)

    return classmethod(method)


def _failing_together(model: Any) -> AbstractContextManager:
    if parallel_plans(model) is None:
        return nullcontext()
    from ..distributed.agreement import failing_together  # imports torch.distributed

    return failing_together(model._device_mesh)
