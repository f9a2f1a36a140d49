"""`PeftModel`'s writing and reading of files, made safe for models on our layers.

PEFT has a table for tuners and one for configurations, but none for what saves and loads them: the
paths are known to two methods of `PeftModel` alone, so these are wrapped. Models on other layers
pass through.
"""

import functools
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from peft import PeftModel

from .checkpoint import bases_misfits, saved_fields
from .files import written_whole
from .model import AcceleratedRandLoraModel

_stock: dict[str, Callable] = {}
_ours: dict[str, Callable] = {}


def install() -> None:
    """Wraps the two methods, once."""
    for name, wrapper in (("save_pretrained", _written_whole), ("load_adapter", _checked)):
        if name not in _ours:
            _stock[name] = getattr(PeftModel, name)
            _ours[name] = wrapper(_stock[name])
            setattr(PeftModel, name, _ours[name])


def uninstall() -> None:
    """Puts PEFT's own back, unless somebody else has wrapped ours since."""
    for name in list(_ours):
        if getattr(PeftModel, name) is _ours[name]:
            setattr(PeftModel, name, _stock[name])
            del _stock[name], _ours[name]


def _written_whole(save_pretrained: Callable) -> Callable:
    @functools.wraps(save_pretrained)
    def save(self, save_directory, *args, **kwargs):
        # PEFT has an error of its own where the folder is a file.
        if not isinstance(self.base_model, AcceleratedRandLoraModel) or os.path.isfile(
            save_directory
        ):
            return save_pretrained(self, save_directory, *args, **kwargs)
        with written_whole(save_directory) as scratch:
            if (card := Path(save_directory, "README.md")).exists():
                shutil.copy(card, scratch)  # PEFT updates a card and keeps its text
            return save_pretrained(self, str(scratch), *args, **kwargs)

    return save


def _checked(load_adapter: Callable) -> Callable:
    @functools.wraps(load_adapter)
    def load(self, model_id, adapter_name, *args, **kwargs):
        # A new adapter takes its configuration from the file; one that is there keeps its own.
        ours = isinstance(self.base_model, AcceleratedRandLoraModel)
        if ours and adapter_name in self.peft_config:
            _check_file(self, model_id, adapter_name, kwargs)
        return load_adapter(self, model_id, adapter_name, *args, **kwargs)

    return load


def _check_file(model: PeftModel, folder: str | os.PathLike, adapter_name: str, hub: dict) -> None:
    """Raises ValueError where the folder's numbers belong to other bases than the adapter's."""
    subfolder = Path(folder, hub.get("subfolder") or "")
    if subfolder.is_dir() and not (subfolder / "adapter_config.json").exists():
        warnings.warn(
            f"{str(subfolder)!r} has no adapter_config.json, so nothing tells whether its "
            f"numbers belong to the bases of adapter {adapter_name!r}",
            stacklevel=3,
        )
        return
    saved, config = saved_fields(folder, **hub), model.peft_config[adapter_name]
    brings_bases = model.base_model.randlora_A.persistent and saved["save_projection"]
    if not brings_bases and (errors := bases_misfits(config, saved)):
        raise ValueError(
            f"the adapter of {str(folder)!r} does not fit {adapter_name!r}, which is unchanged:"
            "\n\t" + "\n\t".join(errors)
        )
    if saved["randlora_alpha"] != config.randlora_alpha:
        warnings.warn(
            f"randlora_alpha of {str(folder)!r} is {saved['randlora_alpha']}, adapter "
            f"{adapter_name!r} keeps its own, {config.randlora_alpha}, as in stock PEFT; "
            "randlora_ext.peft.hotswap_adapter takes over the file's",
            stacklevel=3,
        )
