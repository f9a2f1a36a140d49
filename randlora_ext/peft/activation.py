"""Replacing PEFT's classes and methods by ours, and back.

PEFT has tables for tuners and configurations and calls methods of both, but only `PeftModel`'s
``save_pretrained`` and ``load_adapter`` know the folder before tensors are written to it, or read
from it over an existing adapter. ``add_adapter`` is all that TRL calls to make a reference.
transformers reads configurations by ``PeftConfig.from_pretrained``.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import PeftModel, PeftType
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.randlora.layer import RandLoraLayer
from peft.tuners.randlora.model import RandLoraModel
from torch import nn

from ..basis.description import check_kind
from ..checks import check_model
from ..nn.adapter_config import NEEDS_OURS, PEFT_TYPES
from ..nn.base_layer import check_no_plan
from ..nn.merging import KEEP_WEIGHT
from ..nn.state_dict import guard
from .bases import BASIS_NAMES, PackedBufferDict
from .config import RandLoraConfig, one_save
from .layer import AcceleratedLinear, layers_with
from .loading import check_load_over, warn_of_misfits
from .model import AcceleratedRandLoraModel, accelerate_layer, change_class
from .quantized import backend_of
from .saving import refuse_lora_files, save_together


def enable(float32_products: bool | None = None, keep_weight: str | None = None) -> None:
    """From now on RandLoRA models made or loaded by PEFT run on the compiled kernels.

    Equivalent to editing PEFT's two tables, from the type RANDLORA to its tuner and its config,
    where all of PEFT and transformers look. Models that exist already stay as they are: see
    `accelerate`. Saving and loading of `PeftModel` are wrapped for models on our layers: a file
    appears when it is complete, and what is loaded must belong together.

    Args:
        float32_products: whether dense bases (PEFT's default) are multiplied in float32 in 16-bit
            models, as stock PEFT does at several times the cost, and not in 16 bits with float32
            sums, the default.
        keep_weight: where merged layers keep W, so that unmerging restores every bit: "host", the
            default, is CPU memory, "device" the weight's own device (docs/serve.md). "nothing"
            turns it off, and unmerging subtracts dW as stock PEFT does.

    Both hold for all models, those that exist included, until a call gives another value: None
    leaves them as they are. So a second `enable()`, a library's perhaps, changes nothing.
    """
    if keep_weight is not None:
        check_kind("keep_weight", keep_weight, KEEP_WEIGHT)
        AcceleratedLinear.keep_weight = keep_weight
    if float32_products is not None:
        AcceleratedLinear.float32_products = float32_products
    _patch()
    PEFT_TYPE_TO_CONFIG_MAPPING.update(dict.fromkeys(PEFT_TYPES, RandLoraConfig))
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = AcceleratedRandLoraModel


def disable() -> None:
    """Puts stock PEFT back for models made afterwards; those made in between keep our kernels."""
    PEFT_TYPE_TO_CONFIG_MAPPING.pop(NEEDS_OURS, None)
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] = peft.RandLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = RandLoraModel


def accelerate(model: nn.Module) -> nn.Module:
    """Puts the RandLoRA layers of a model that PEFT made already on the compiled kernels, in place.

    Equivalent to having called `enable` before the model was made: layers get their accelerated
    class, ternary bases are packed and PEFT's dense ones dropped. Parameters, their names and
    optimizer state stay as they are. Returns the model; calling it again changes nothing.

    Raises ValueError, and changes nothing, if the model holds no RandLoRA layer, if its bases are
    on the meta device, if tensor parallelism has cut a layer, or if a quantized layer is merged:
    stock PEFT has added another matrix than our unmerging would subtract.
    """
    check_model(model)
    layers = [module for module in model.modules() if isinstance(module, RandLoraLayer)]
    if not layers:
        raise ValueError(f"model holds no RandLoRA layer of PEFT: {type(model).__qualname__}")
    merged = [each for each in layers if each.merged and not isinstance(each, AcceleratedLinear)]
    if any(backend_of(layer.get_base_layer()) for layer in merged):
        raise ValueError(
            "model has quantized layers merged by stock PEFT; call unmerge_adapter() first"
        )
    tuners: list[Any] = [module for module in model.modules() if type(module) is RandLoraModel]
    for tuner in tuners:
        for name, module in tuner.model.named_modules():
            if isinstance(module, RandLoraLayer):
                check_no_plan(tuner.model, name, f"layer {name!r}")
    held = [(one, name, getattr(one, name)) for one in tuners + layers for name in BASIS_NAMES]
    stock_bases = {id(b): b for *_, b in held if not isinstance(b, PackedBufferDict)}
    packed = {key: PackedBufferDict(b, b.persistent) for key, b in stock_bases.items()}
    for one, name, bases in held:
        setattr(one, name, packed.get(id(bases), bases))
    for layer in layers:
        accelerate_layer(layer)
    for tuner in tuners:
        change_class(tuner, AcceleratedRandLoraModel)
        guard(tuner.model)
    refuse_lora_files(model)
    _patch()
    return model


@functools.cache
def _patch() -> None:
    """Wraps the methods, for good: what `disable` leaves alive is saved and loaded as before."""
    for owner, name, around in (
        (PeftModel, "save_pretrained", save_together),
        (PeftModel, "from_pretrained", _open),
        (PeftModel, "load_adapter", _load),
        (PeftModel, "add_adapter", _add),
        (PeftConfigMixin, "from_pretrained", _read_config),
    ):
        setattr(owner, name, _wrapped(owner.__dict__[name], around))


def _wrapped(stock: Any, around: Callable) -> Any:
    """`stock`, but ``around(stock, ...)`` for models on our layers and if it is a class method."""
    function = getattr(stock, "__func__", stock)

    @functools.wraps(function)
    def method(self, *args, **kwargs):
        if isinstance(self, type) or isinstance(self.base_model, AcceleratedRandLoraModel):
            return around(function, self, *args, **kwargs)
        return function(self, *args, **kwargs)

    return method if function is stock else classmethod(method)


def _open(stock: Callable, cls, model, model_id, *args, **kwargs):
    with one_save(model_id, kwargs) as place:
        return stock(cls, model, place, *args, **kwargs)


def _load(stock: Callable, model: PeftModel, model_id, adapter_name, *args, **kwargs):
    # A new adapter takes its configuration from the file; one that is there keeps its own.
    is_new = adapter_name not in model.peft_config
    with one_save(model_id, kwargs) as place:
        if not is_new:
            check_load_over(model, place, adapter_name, kwargs)
        try:
            result = stock(model, place, adapter_name, *args, **kwargs)
        except BaseException as error:
            if is_new and adapter_name in model.peft_config:
                model.delete_adapter(adapter_name)
            if isinstance(error, KeyError):  # PEFT's, of modules_to_save
                raise ValueError(
                    f"{place!r} lacks {error}, which adapter {adapter_name!r} needs"
                ) from error
            raise
    warn_of_misfits(place, adapter_name, result)
    return result


def _add(stock: Callable, model: PeftModel, adapter_name, peft_config, *args, **kwargs) -> None:
    """Also copies "default" into an added adapter "ref" as TRL means to.

    DPO, KTO, GRPO and RLOO then copy every parameter whose name contains ".default." into "ref".
    Names of RandLoRA *end* in ".default", so the reference would silently be the base model
    (docs/trl.md). TRL passes the configuration object of "default" itself. If a mended version
    copies the numbers, too, they are the same.
    """
    stock(model, adapter_name, peft_config, *args, **kwargs)
    is_default = peft_config is model.peft_config.get("default")
    if adapter_name != "ref" or not is_default or "trl" not in sys.modules:
        return
    with torch.no_grad():
        for layer in layers_with(model, "ref").values():
            for diagonals in (layer.randlora_lambda, layer.randlora_gamma):
                diagonals["ref"].copy_(diagonals["default"])


def _read_config(stock: Callable, cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
    kwargs["subfolder"] = subfolder
    with one_save(pretrained_model_name_or_path, kwargs) as place:
        return stock(cls, place, **kwargs)
