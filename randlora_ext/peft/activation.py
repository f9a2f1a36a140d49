"""Replacing PEFT's classes by ours, and back.

PEFT looks tuners and configurations up in two tables and calls methods of both. Of PEFT's own
methods one is wrapped, while `enable` is in force.
"""

import functools
from collections.abc import Callable
from typing import Any

import peft
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.randlora.layer import RandLoraLayer
from peft.tuners.randlora.model import RandLoraModel
from torch import nn

from ..checks import check_model, check_one_of
from ..nn.adapter_config import NEEDS_OURS, PEFT_TYPES
from ..nn.base_layer import check_no_plan
from ..nn.merging import KEEP_WEIGHT, remember_merged
from ..nn.state_dict import guard
from .bases import PackedBufferDict
from .config import RandLoraConfig
from .layer import AcceleratedLinear
from .model import AcceleratedRandLoraModel, layer_class
from .quantized import backend_of
from .saving import refuse_lora_files, save_together


def enable(float32_products: bool | None = None, keep_weight: str | None = None) -> None:
    """From now on RandLoRA models made or loaded by PEFT run on the compiled kernels.

    Equivalent to editing PEFT's two tables, from the type RANDLORA to its tuner and its config,
    where all of PEFT and transformers look. Models that exist already stay as they are: see
    `accelerate`. ``PeftModel.save_pretrained`` is wrapped: files of a model on our layers appear
    when they are complete. Nothing else of PEFT is replaced.

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
        check_one_of("keep_weight", keep_weight, KEEP_WEIGHT)
        AcceleratedLinear.keep_weight = keep_weight
    if float32_products is not None:
        AcceleratedLinear.float32_products = float32_products
    _wrap_save_pretrained()
    PEFT_TYPE_TO_CONFIG_MAPPING.update(dict.fromkeys(PEFT_TYPES, RandLoraConfig))
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = AcceleratedRandLoraModel


def disable() -> None:
    """Puts stock PEFT back, its tables and its method. Models made in between keep our kernels and
    are saved by PEFT alone, in place."""
    PEFT_TYPE_TO_CONFIG_MAPPING.pop(NEEDS_OURS, None)
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] = peft.RandLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = RandLoraModel
    if _stock_save:
        PeftModel.save_pretrained = _stock_save.pop()


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
    stock = [layer for layer in layers if not isinstance(layer, AcceleratedLinear)]
    merged = [layer for layer in stock if layer.merged]
    if any(backend_of(layer.get_base_layer()) for layer in merged):
        raise ValueError(
            "model has quantized layers merged by stock PEFT; call unmerge_adapter() first"
        )
    tuners: list[Any] = [module for module in model.modules() if type(module) is RandLoraModel]
    for tuner in tuners:
        for name, module in tuner.model.named_modules():
            if isinstance(module, RandLoraLayer):
                check_no_plan(tuner.model, name, f"layer {name!r}")
    _pack_bases(tuners + layers)
    for layer in layers:
        _accelerate_layer(layer)
    for tuner in tuners:
        tuner.__class__ = AcceleratedRandLoraModel
        guard(tuner.model)
    refuse_lora_files(model)
    return model


def _pack_bases(modules: list[Any]) -> None:
    """Gives modules of PEFT packed bases, shared as those that they have are."""
    held = {bases for module in modules for bases in (module.randlora_A, module.randlora_B)}
    # All of them before anything changes, because those on the meta device are refused.
    packed = {
        bases: PackedBufferDict(bases, bases.persistent)
        for bases in held
        if not isinstance(bases, PackedBufferDict)
    }
    for module in modules:
        module.randlora_A = packed.get(module.randlora_A, module.randlora_A)
        module.randlora_B = packed.get(module.randlora_B, module.randlora_B)


def _accelerate_layer(layer: Any) -> None:
    """Gives a RandLoRA layer of PEFT its accelerated class, in place; ours stay as they are."""
    if isinstance(layer, AcceleratedLinear):
        return
    layer.__class__ = layer_class(layer.get_base_layer())
    layer.add_our_own()
    if layer.merged:  # by stock PEFT
        remember_merged(layer)


# PEFT's own `save_pretrained` while ours is in its place.
_stock_save: list[Callable] = []


def _wrap_save_pretrained() -> None:
    """Has models on our layers saved by `save_together`.

    This is the one method of PEFT that is wrapped: it alone knows the folder before anything is
    written to it, and it writes the tensors there itself, so a save that is cut off would leave
    neither the old adapter nor the new one.
    """
    if _stock_save:
        return
    stock = PeftModel.save_pretrained

    @functools.wraps(stock)
    def save_pretrained(model: PeftModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(model.base_model, AcceleratedRandLoraModel):
            save_together(stock, model, save_directory, *args, **kwargs)
        else:
            stock(model, save_directory, *args, **kwargs)

    PeftModel.save_pretrained = save_pretrained
    _stock_save.append(stock)
