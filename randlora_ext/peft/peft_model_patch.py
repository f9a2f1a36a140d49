"""Methods of `PeftModel`, made safe for models on our layers.

The only patch of the package. PEFT has tables for tuners and configurations and calls methods of
both, but only ``save_pretrained`` and ``load_adapter`` of `PeftModel` know the folder before
tensors are written to it, or read from it over an existing adapter, and ``add_adapter`` is all that
TRL calls to make a reference. ``push_to_hub`` writes the hub's empty card over PEFT's before it
calls ``_upload_modified_files``. Models on other layers pass through.
"""

import functools
from collections.abc import Callable
from pathlib import Path

from peft import PeftModel

from .card import Base, write_card
from .files import name_of
from .loading import check_load_over, warn_of_misfits
from .model import AcceleratedRandLoraModel
from .saving import save_together
from .trl_reference import fill_reference

_patched: dict[str, tuple[Callable, Callable]] = {}  # (PEFT's, ours)


def install() -> None:
    """Wraps the methods, once."""
    for name, around in (
        ("save_pretrained", _save),
        ("load_adapter", _load),
        ("add_adapter", _add),
        ("_upload_modified_files", _upload),
    ):
        stock = getattr(PeftModel, name, None)  # a private one may go
        if name not in _patched and stock is not None:
            ours = _for_our_models(stock, around)
            _patched[name] = stock, ours
            setattr(PeftModel, name, ours)


def uninstall() -> None:
    """Puts PEFT's own back, unless somebody else has wrapped ours since."""
    for name, (stock, ours) in list(_patched.items()):
        if getattr(PeftModel, name) is ours:
            setattr(PeftModel, name, stock)
            del _patched[name]


def _for_our_models(stock: Callable, around: Callable) -> Callable:
    @functools.wraps(stock)
    def method(self, *args, **kwargs):
        if isinstance(self.base_model, AcceleratedRandLoraModel):
            return around(stock, self, *args, **kwargs)
        return stock(self, *args, **kwargs)

    return method


def _save(stock: Callable, model: PeftModel, save_directory, *args, **kwargs) -> None:
    def save(folder: str) -> None:
        stock(model, folder, *args, **kwargs)
        if is_main:
            write_card(Path(folder), name_of(save_directory), Base.of(model.get_base_model()))

    is_main = kwargs.get("is_main_process", True)
    save_together(save, save_directory, is_main)


def _load(stock: Callable, model: PeftModel, model_id, adapter_name, *args, **kwargs):
    # A new adapter takes its configuration from the file; one that is there keeps its own.
    if adapter_name in model.peft_config:
        check_load_over(model, model_id, adapter_name, kwargs)
    result = stock(model, model_id, adapter_name, *args, **kwargs)
    warn_of_misfits(model_id, adapter_name, result)
    return result


def _add(stock: Callable, model: PeftModel, adapter_name, peft_config, *args, **kwargs) -> None:
    stock(model, adapter_name, peft_config, *args, **kwargs)
    fill_reference(model, adapter_name, peft_config)


def _upload(stock: Callable, model: PeftModel, working_dir, repo_id: str, *args, **kwargs):
    model.create_or_update_model_card(str(working_dir))
    write_card(Path(working_dir), repo_id, Base.of(model.get_base_model()))
    return stock(model, working_dir, repo_id, *args, **kwargs)
