"""Which kernels a PEFT model runs on, in one line."""

from collections import Counter

from peft.tuners.randlora.layer import RandLoraLayer
from torch import nn

from ..nn.linear import RandLoraLinear
from ..ops.path import explain
from .layer import Accelerated


def kernel_summary(model: nn.Module, tokens: int = 512) -> str:
    """One line: how many layers run on our kernels, shapes, densities, instruction set and path.

    Args:
        model: a PEFT model, or any module that holds RandLoRA layers of PEFT.
        tokens: rows of x for which the path is told.

    Equal layers are counted together. Others are named with the reason.
    """
    ours: Counter[str] = Counter()
    dense: Counter[str] = Counter()
    stock = 0
    isas: set[str] = set()
    for layer in model.modules():
        if not isinstance(layer, RandLoraLayer):
            continue
        if not isinstance(layer, Accelerated):
            stock += 1
            continue
        weight, base = layer.get_base_layer().weight, layer.get_base_layer()
        names = [name for name in layer.active_adapters if name in layer.randlora_lambda]
        for name in names:
            basis, reason = layer.basis_of(name, weight.device)
            if basis is None:
                dense[reason] += 1
                continue
            has_weight = type(base) is nn.Linear and len(names) == 1
            drop = getattr(layer.randlora_dropout[name], "p", 0.0) if layer.training else 0.0
            choice = explain(basis, tokens, weight.dtype, weight.device, has_weight, drop)
            isas.add(choice.isa)
            ours[
                f"{layer.in_features}->{layer.out_features} r={basis.r} "
                f"density {basis.density:.3g} {choice.path}"
            ] += 1
    parts = []
    if ours:
        listed = ", ".join(f"{count}x {what}" for what, count in sorted(ours.items()))
        parts.append(
            f"{ours.total()} RandLoRA layers on randlora_ext's {'/'.join(sorted(isas))} kernels at "
            f"{tokens} tokens: {listed}"
        )
    for reason, count in dense.items():
        parts.append(f"{count} layers by dense bases: {reason}")
    if stock:
        parts.append(
            f"{stock} layers on PEFT's own code: made without randlora_ext.peft.enable(); see "
            "accelerate()"
        )
    if not parts and any(isinstance(module, RandLoraLinear) for module in model.modules()):
        return "no RandLoRA layers of PEFT; each RandLoraLinear tells of its own when printed"
    return "; ".join(parts) or "no RandLoRA layers"
