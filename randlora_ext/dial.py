"""`set_dial`: a trained adapter, turned down."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .checks import check_number, check_one_of
from .nn.adapted_layer import AdaptedLayer, layers_by_name
from .ranks import full_tensor, gathered


@torch.no_grad()
def set_dial(model: nn.Module, factor: float, adapter_name: str = "default") -> None:
    """Multiplies an adapter's dW by a factor, for good: ``dW = factor * dW``.

    After a short training a factor of 0.7 kept most of what was learned, and gave back most of what
    was forgotten; after a long one it cost more (docs/train.md). `ForgettingBudget` chooses the
    factor by itself.

    Lambda takes the factor, in place. dW is linear in lambda, so the result is exact up to one
    rounding of each element, and lambda goes everywhere: into files, state dicts and merged
    weights. ``scaling`` would not, as no state dict holds it.

    Call it after training; an optimizer knows nothing of it. Factors multiply: 0.7 and then 0.5 is
    0.35.

    Args:
        model: with adapters of `RandLoraLinear` or PEFT.
        factor: a positive finite number.
        adapter_name: which adapter, active or not.

    If FSDP2 or DeepSpeed's ZeRO-3 has sharded the model, all ranks must call.

    Raises, and changes nothing: TypeError or ValueError if factor is no such number, or so large
    that an element of lambda would become infinite, or so small that the whole lambda of a layer
    would become zero; the adapter is not there or merged; or it has no values (meta device).

    Source: scaling a finished update is known from LoRA (PEFT's ``scale_layer``) and from model
    arithmetic (arXiv:2212.04089).
    """
    check_number("factor", factor, "a positive finite number", lambda v: 0 < v < math.inf)
    layers = _layers(model, adapter_name)
    lambdas = {layer.randlora_lambda[adapter_name]: name for name, layer in layers.items()}
    with gathered(lambdas, writes=True):
        for lam, name in lambdas.items():
            if lam.is_meta:
                raise ValueError(f"lambda of layer {name!r} has no numbers (meta device)")
            if _loses_numbers(lam, factor):
                raise ValueError(
                    f"factor {factor!r} would make lambda infinite or zero, in layer {name!r}"
                )
        for lam in lambdas:
            lam.mul_(factor)


def _loses_numbers(lam: Tensor, factor: float) -> bool:
    lam = full_tensor(lam)
    turned = lam * factor
    becomes_zero = bool(lam.any()) and not bool(turned.any())
    return becomes_zero or bool((turned.isfinite() != lam.isfinite()).any())


def _layers(model: nn.Module, adapter_name: str) -> dict[str, AdaptedLayer]:
    """Those with the adapter, by their names; ValueError if there are none, or one is merged."""
    found = layers_by_name(model)
    if not found:
        raise ValueError(
            "model has no RandLoRA adapter on our layers; PEFT's get_peft_model adds one after "
            "randlora_ext.peft.enable(); merge_and_unload takes it away"
        )
    known = {adapter for layer in found.values() for adapter in layer.randlora_lambda}
    check_one_of("adapter_name", adapter_name, known)
    layers = {n: layer for n, layer in found.items() if adapter_name in layer.randlora_lambda}
    for name, layer in layers.items():
        if adapter_name in layer.merged_adapters:
            raise ValueError(
                f"adapter {adapter_name!r} of layer {name!r} is merged; unmerge it first"
            )
    return layers


@contextmanager
def dialed(
    layers: Iterable[AdaptedLayer], adapters: Sequence[str], factor: float
) -> Iterator[None]:
    """Inside it the adapters' dW is factor * dW; afterwards it is as before, bit for bit."""
    before = {layer: dict(layer.scaling) for layer in layers}
    try:
        for layer in before:
            for adapter in set(adapters) & layer.scaling.keys():
                layer.scaling[adapter] *= factor
        yield
    finally:
        for layer, scaling in before.items():
            layer.scaling.update(scaling)
