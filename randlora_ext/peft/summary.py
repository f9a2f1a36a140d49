"""Which kernels a PEFT model runs on, in one line."""

from collections import Counter

from peft.tuners.randlora.layer import RandLoraLayer
from torch import nn

from ..nn.linear import RandLoraLinear
from .layer import AcceleratedLayer

_STOCK = "on PEFT's own code: made without randlora_ext.peft.enable(); see accelerate()"


def kernel_summary(model: nn.Module, tokens: int = 512) -> str:
    """One line: how many layers run on our kernels, shapes, densities, instruction set and path.

    Equal layers are counted together; others are named with the reason. "(counted)" marks the
    share of non-zeros of bases that were drawn or loaded, which is near the density asked for.

    Args:
        model: a PEFT model, or any module that holds RandLoRA layers of PEFT.
        tokens: rows of x for which the path is shown.
    """
    ours: Counter[str] = Counter()
    others: Counter[str] = Counter()
    isas = set()
    for layer in (m for m in model.modules() if isinstance(m, RandLoraLayer)):
        if not isinstance(layer, AcceleratedLayer):
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
    if not parts and any(isinstance(module, RandLoraLinear) for module in model.modules()):
        return "no RandLoRA layers of PEFT; each RandLoraLinear tells of its own when printed"
    return "; ".join(parts) or "no RandLoRA layers"
