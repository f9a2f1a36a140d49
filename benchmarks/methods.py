"""The ways to train one frozen layer that the benchmarks compare."""

import copy
import math
import warnings

import torch
from torch import Tensor, nn

from randlora_ext import Basis, linear

SCALING = 20.0  # PEFT's default, alpha / r = 640 / 32
# "peft" is PEFT's own RandLoRA, "full" full fine-tuning.
METHODS = ("lora", "peft", "dora", "vera", "full", "ours")


class Ours(nn.Module):
    """The fused operator on a frozen layer."""

    def __init__(self, base: nn.Linear, basis: Basis):
        super().__init__()
        self.base, self.basis = base, basis
        self.lam = nn.Parameter(torch.randn(basis.r, basis.n) * 0.1)
        self.gam = nn.Parameter(torch.full((basis.n, basis.d), 1 / max(basis.n, basis.d)))

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.base.weight, self.base.bias
        return linear(x, w, b, self.basis, self.lam, self.gam, SCALING)


def density_of(text: str, d: int) -> float:
    """A number, a fraction, or PEFT's very_sparse (1 / sqrt(d)); 1 for bases without zeros."""
    if text in ("hadamard", "dense"):
        return 1.0
    if text == "very_sparse":
        return 1 / math.sqrt(d)
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1)


def basis_of(text: str, size: tuple[int, int], rank: int, seed: int = 0) -> Basis:
    """The bases that `text` names, for a layer of `size` = (in, out).

    A density (`density_of`) names independent ones, "hadamard" ours, "dense" uniform ones of unit
    variance, PEFT's default.
    """
    if text == "dense":
        make, (d, D) = torch.Generator().manual_seed(seed), sorted(size)
        matrices = (
            3**0.5 * (2 * torch.rand(shape, generator=make) - 1)
            for shape in ((rank, d), (D, -(-d // rank) * rank))
        )
        return Basis.from_dense(*matrices, *size)
    if text == "hadamard":
        return Basis(*size, rank, seed=seed, kind="hadamard")
    return Basis(*size, rank, density_of(text, min(size)), seed)


def frozen_layer(size: tuple[int, int], dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*size).to(dtype).requires_grad_(False)


def make(method: str, base: nn.Linear, rank: int, density: str) -> nn.Module:
    """`method` of METHODS, or "frozen", on `base`, with an adapter that is not zero.

    PEFT's adapters are PEFT's own layers with its defaults beside r (VeRA: its own r of 256, whose
    matrices are not trained); in 16 bits PEFT keeps adapters in float32. PEFT's RandLoRA is dense
    or very_sparse if asked for, otherwise sparse (1/3): its bases are dense and cost the same.
    """
    if method == "frozen":
        return base
    if method == "full":
        return copy.deepcopy(base).requires_grad_(True)
    if method == "ours":
        return Ours(base, basis_of(density, (base.in_features, base.out_features), rank))
    return _of_peft(method, base, rank, density)


def _of_peft(method: str, base: nn.Linear, rank: int, density: str) -> nn.Module:
    import peft  # here, because it takes seconds and not every program compares with PEFT

    targets = {"target_modules": ["1"]}
    flags = {"dense": {}, "very_sparse": {"very_sparse": True}}.get(density, {"sparse": True})
    configs = {
        "lora": lambda: peft.LoraConfig(r=rank, **targets),
        "dora": lambda: peft.LoraConfig(r=rank, use_dora=True, **targets),
        "vera": lambda: peft.VeraConfig(save_projection=False, **targets),
        "peft": lambda: peft.RandLoraConfig(
            r=rank, randlora_alpha=SCALING * rank, save_projection=False, **flags, **targets
        ),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save")
        model = peft.get_peft_model(nn.Sequential(nn.Linear(1, 1), base), configs[method]())
    layer = model.base_model.model[1]
    for name, parameter in layer.named_parameters():
        if any(zero in name for zero in ("lora_B", "randlora_lambda", "vera_lambda_b")):
            nn.init.normal_(parameter, std=0.1)
    return layer
