"""Replacing PEFT's classes by ours, and back; which kernels a model runs on."""

import gc
import warnings
from collections import Counter
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.randlora.layer import RandLoraLayer
from peft.tuners.randlora.model import RandLoraModel
from torch import nn

from ..nn.adapted_layer import AdaptedLayer
from ..nn.merging import check_keep_weight
from . import peft_model_patch
from .bases import BASIS_NAMES, PackedBufferDict
from .config import RandLoraConfig
from .layer import AcceleratedLayer
from .model import STOCK_QUANTIZED, AcceleratedRandLoraModel, accelerate_layer, parallel_plans

_STOCK = "on PEFT's own code: made without randlora_ext.peft.enable(); see accelerate()"
_stock: tuple[type, type] | None = None


def enable(float32_products: bool = False, keep_weight: str = "host") -> None:
    """From now on RandLoRA models made or loaded by PEFT run on the compiled kernels.

    Equivalent to editing PEFT's two tables, from the type RANDLORA to its tuner and its config:
    `get_peft_model`, `PeftModel.from_pretrained`, `inject_adapter_in_model` and transformers' own
    loading of adapters all look there. Models that exist already stay as they are, which a warning
    says. Calling it again changes nothing else. ``PeftModel.save_pretrained`` and ``load_adapter``
    are wrapped for models on our layers: a file appears when it is complete, and what is loaded
    over an adapter must belong to its bases.

    Args:
        float32_products: whether dense bases (PEFT's default) are multiplied in float32 in 16-bit
            models, as stock PEFT does at several times the cost, and not in 16 bits with float32
            sums. It holds for all models.
        keep_weight: where merged layers keep W, so that unmerging restores every bit: "host" is
            CPU memory, "device" the weight's own device (docs/serve.md). "nothing" turns it off,
            and unmerging subtracts dW as stock PEFT does. It holds for all models.

    Adapters are saved in PEFT's format, and stock PEFT loads them unless `RandLoraConfig` says
    otherwise.
    """
    global _stock
    check_keep_weight(keep_weight)
    AcceleratedLayer.keep_weight = keep_weight
    AcceleratedLayer.float32_products = float32_products
    peft_model_patch.install()
    if _stock is None:
        _stock = (
            PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA],
            PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA],
        )
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] = RandLoraConfig
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = AcceleratedRandLoraModel
        if any(type(each) is RandLoraModel for each in gc.get_objects()):
            warnings.warn(
                "a RandLoRA model was made before randlora_ext.peft.enable() and keeps PEFT's own "
                "layers; randlora_ext.peft.accelerate(model) puts it on our kernels",
                stacklevel=2,
            )


def disable() -> None:
    """Puts stock PEFT back for models made afterwards; those made in between keep our kernels."""
    global _stock
    peft_model_patch.uninstall()
    if _stock is not None:
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANDLORA] = _stock[0]
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDLORA] = _stock[1]
        _stock = None


def accelerate(model: nn.Module) -> nn.Module:
    """Puts the RandLoRA layers of a model that PEFT made already on the compiled kernels, in place.

    Equivalent to having called `enable` before the model was made: layers get their accelerated
    class, ternary bases are packed and PEFT's dense ones dropped. Parameters, their names and
    optimizer state stay as they are. Returns the model; calling it again changes nothing.

    Raises ValueError, and changes nothing, if the model holds no RandLoRA layer, if its bases are
    on the meta device, if transformers has sharded a layer, or if a quantized layer is merged:
    stock PEFT has added another matrix than our unmerging would subtract.
    """
    layers = [module for module in model.modules() if isinstance(module, RandLoraLayer)]
    if not layers:
        raise ValueError(f"model holds no RandLoRA layer of PEFT: {type(model).__qualname__}")
    if any(layer.merged for layer in layers if type(layer).__module__ == STOCK_QUANTIZED):
        raise ValueError(
            "model has quantized layers merged by stock PEFT; call unmerge_adapter() first"
        )
    tuners = [module for module in model.modules() if type(module) is RandLoraModel]
    if any(_is_sharded(tuner.model) for tuner in tuners):
        raise ValueError("model is sharded by transformers; call enable() before adding adapters")
    packed: dict[int, PackedBufferDict] = {}
    for holder in tuners + layers:
        for name in BASIS_NAMES:
            bases = getattr(holder, name)
            if id(bases) not in packed:
                ours = isinstance(bases, PackedBufferDict)
                packed[id(bases)] = bases if ours else PackedBufferDict.of(bases)
    for holder in tuners + layers:
        for name in BASIS_NAMES:
            setattr(holder, name, packed[id(getattr(holder, name))])
    for layer in layers:
        accelerate_layer(layer)
    for tuner in tuners:
        tuner.__class__ = AcceleratedRandLoraModel
    peft_model_patch.install()
    return model


def kernel_summary(model: nn.Module, tokens: int = 512) -> str:
    """One line: how many layers run on our kernels, shapes, bases, instruction set and path.

    Equal layers are counted together; others are named with the reason. "(counted)" marks the
    share of non-zeros of bases that were drawn or loaded, which is near the density asked for.

    Args:
        model: a module that holds RandLoRA layers, of PEFT or `RandLoraLinear`.
        tokens: rows of x for which the path is shown.
    """
    ours: Counter[str] = Counter()
    others: Counter[str] = Counter()
    isas = set()
    for layer in (m for m in model.modules() if isinstance(m, (RandLoraLayer, AdaptedLayer))):
        if not isinstance(layer, AdaptedLayer):
            others[_STOCK] += 1
            continue
        for name in layer.active_adapters:
            if name in layer.randlora_lambda:
                isa, told = layer.describe(name, tokens)
                if isa:
                    isas.add(isa)
                    ours[f"{layer.in_features}->{layer.out_features} {told}"] += 1
                else:
                    others[f"by {told}"] += 1
    parts = [f"{count} layers {what}" for what, count in others.items()]
    if ours:
        listed = ", ".join(f"{count}x {what}" for what, count in sorted(ours.items()))
        kernels = f"{'/'.join(sorted(isas))} kernels at {tokens} tokens"
        parts.insert(0, f"{ours.total()} RandLoRA layers on randlora_ext's {kernels}: {listed}")
    return "; ".join(parts) or "no RandLoRA layers"


def _is_sharded(model: Any) -> bool:
    plans = parallel_plans(model)
    layers = (name for name, module in model.named_modules() if isinstance(module, RandLoraLayer))
    return plans is not None and any(plans.plan_of(model, name) for name in layers)
