"""The ways to train one layer that layers.py compares, each as a module on the same frozen base."""

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from randlora_ext import TernaryBasis, ops

from .stage import BALANCED, DENSITIES, RANK, SCALING, basis_of, size_text

# path of linear, and how the factored one multiplies by B
PATHS = {
    "factored, packed B": ("factored", "packed"),
    "factored, dense B": ("factored", "dense"),
    "delta": ("delta", "packed"),
    "merged": ("merged", "packed"),
}


@dataclass
class Method:
    name: str
    density: str  # a label of stage.DENSITIES, BALANCED, or "" where none matters
    layer: nn.Module
    state: list[Tensor]  # what is there whatever happens: weights, adapters, bases


class Ours(nn.Module):
    """The fused operator by one path; what RandLoraLinear does with `path` fixed."""

    def __init__(self, base: nn.Linear, basis: TernaryBasis, path: str) -> None:
        super().__init__()
        self.base, self.basis = base, basis
        self.path, self.b_side = PATHS[path]
        device = base.weight.device
        self.lam = nn.Parameter(torch.randn(basis.r, basis.n, device=device) * 0.1)
        gam = torch.full((basis.n, basis.d), 1 / max(basis.n, basis.d), device=device)
        self.gam = nn.Parameter(gam)

    def packed(self) -> list[Tensor]:
        weight = self.base.weight
        packed = self.basis.packed(weight.device)
        if self.b_side == "dense":
            packed = [*packed, self.basis.dense_b(weight.device, weight.dtype)]
        return packed

    def forward(self, x: Tensor) -> Tensor:
        base, basis = self.base, self.basis
        return ops.linear(
            x, base.weight, base.bias, self.lam, self.gam, self.packed(), SCALING * basis.scale,
            basis.out_features, self.path, basis.slice_expand,
        )  # fmt: skip


def of_peft(base: nn.Linear, kind: str, options: dict, **more) -> nn.Module:
    """A copy of `base` as the only layer of a PEFT model, its adapter away from zero."""
    import peft  # here, for what it cannot do must not cost the other rows

    config = getattr(peft, kind)(**options, target_modules=["1"])
    model = nn.Sequential(nn.Linear(1, 1), copy.deepcopy(base).cpu())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = peft.get_peft_model(model, config, **more).base_model.model[1]
    layer = layer.to(base.weight.device)
    for name, parameter in layer.named_parameters():
        if "lora_B" in name or "randlora_lambda" in name:
            nn.init.normal_(parameter, std=0.1)
    return layer


def all_methods(
    size: tuple[int, int], device: torch.device, failed: Callable[[str, BaseException], None],
    rank: int = RANK,
) -> list[Method]:  # fmt: skip
    """Frozen base, LoRA and PEFT's RandLoRA as they ship and in bf16, ours by density and path.
    `failed` is told of those that cannot be made."""
    torch.manual_seed(0)
    base = nn.Linear(*size, device=device, dtype=torch.bfloat16).requires_grad_(False)
    lora = functools.partial(of_peft, base, "LoraConfig", {"r": rank, "lora_alpha": rank})
    # Its cost is the same for every density: the bases are dense.
    randlora = functools.partial(
        of_peft, base, "RandLoraConfig",
        {"r": rank, "randlora_alpha": SCALING * rank, "sparse": True, "save_projection": False},
    )  # fmt: skip
    ways: list[tuple[str, str, Callable[[], nn.Module]]] = [
        ("frozen", "", lambda: base),
        # PEFT keeps adapters in fp32 by default and casts x; without that LoRA is cheaper.
        (f"LoRA r={rank}, fp32 adapter", "", lora),
        (f"LoRA r={rank}, bf16 adapter", "", lambda: lora(autocast_adapter_dtype=False)),
    ]
    for density in DENSITIES:
        basis = basis_of(density, size, rank)
        ways += [(path, density, functools.partial(Ours, base, basis, path)) for path in PATHS]
    way = "factored, packed B"
    balanced = basis_of(BALANCED, size, rank)
    ways.append((way, BALANCED, functools.partial(Ours, base, balanced, way)))
    # Last: after a graph capture that fails, those that follow may fail too.
    ways.append(("PEFT RandLoRA as shipped", "", randlora))
    ways.append(("PEFT RandLoRA in bf16", "", lambda: randlora().to(torch.bfloat16)))
    methods = []
    for name, density, make in ways:
        try:
            layer = make()
            state = [*layer.parameters(), *layer.buffers()]
            if isinstance(layer, Ours):
                state += layer.packed()
        except Exception as error:
            failed(f"{name} {density} {size_text(size)}", error)
            continue
        methods.append(Method(name, density, layer, state))
    return methods


def trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]
