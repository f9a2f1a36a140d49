"""Which path a call takes, and why: a small model of the work each one does.

The unit is T * D * d multiply-adds at the speed of a dense GEMM; a frozen linear layer trains at 2
units (forward and dx). The constants were measured on one AVX-512 machine (2 cores) and are
rough on purpose: they only have to rank three paths, and `python benchmarks/layer.py --paths`
shows how well they do.
"""

import os
from dataclasses import dataclass, field

import torch

from . import _C
from .basis import TernaryBasis

PATHS = ("factored", "delta", "merged")

# Cost of one multiply-add or signed add of ours, in multiply-adds of a dense GEMM.
A_SIDE = 1.0  # structured products on gathered rows: as fast as a GEMM
B_LISTS = 1.6  # signed adds of whole token vectors from L2
B_PLANES = 1.9  # the same, and the decoding of the planes
# Forming dW, per entry: adds of compact rows, their scatter, and conversion with memory traffic.
FORM_ADD = 2.3
FORM_SCATTER = 17.0
FORM_ENTRY = 45.0
# In a training step dW is formed twice and its gradient contracted once, at twice the cost.
FORMATIONS = 4


@dataclass(frozen=True)
class PathChoice:
    """The path of a call, the reason, and the predicted units of each path."""

    path: str
    reason: str
    isa: str
    costs: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        costs = ", ".join(f"{p} {c:.2f}" for p, c in self.costs.items())
        return (
            f"path {self.path} on {self.isa} kernels: {self.reason} "
            f"(predicted units beside the frozen layer's 2: {costs})"
        )


def predicted_costs(basis: TernaryBasis, tokens: int, has_weight: bool) -> dict[str, float]:
    """Training units (forward, dx, dlam, dgam) of each path beside the base layer's 2."""
    density, K, d, D = basis.density, basis.K, basis.d, basis.D
    # Backward recomputes U: for d == in it needs it anyway, for d == out it is one product more.
    a_products, b_products = (3, 2) if d == basis.in_features else (3, 3)
    b_side = B_PLANES if basis.format == "planes" else B_LISTS
    factored = density * K * (a_products * A_SIDE / D + b_products * b_side / d)
    form = FORM_ADD * density**2 * K + FORM_SCATTER * density * basis.r + FORM_ENTRY
    formation = FORMATIONS * form / max(tokens, 1)
    costs = {"factored": factored, "delta": 3 + formation}
    if has_weight:
        costs["merged"] = 1 + formation
    return costs


def explain(
    basis: TernaryBasis,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    has_weight: bool = True,
    dropout: float = 0.0,
) -> PathChoice:
    """The path that `linear(..., path="auto")` takes for `tokens` rows of x, and why.

    With dropout the adapter sees another x than the base layer, so weight and adapter cannot be
    one product and `merged` is out. In 16 bits `merged` is out too: |dW| below half an ulp of W
    vanishes in W + dW. The environment variable RANDLORA_PATH overrides the choice.

    Raises ValueError where RANDLORA_PATH is none of auto, factored, delta, merged.
    """
    has_weight = has_weight and dropout == 0.0
    path, reason = _decide(basis, tokens, dtype, has_weight, os.environ.get("RANDLORA_PATH"))
    isa = _C.isa() if torch.device(device).type == "cpu" else torch.device(device).type
    return PathChoice(path, reason, isa, predicted_costs(basis, tokens, has_weight))


def choose_path(basis: TernaryBasis, tokens: int, dtype: torch.dtype, has_weight: bool) -> str:
    """`explain(...).path`, as `linear` asks for it at every call."""
    return _decide(basis, tokens, dtype, has_weight, os.environ.get("RANDLORA_PATH"))[0]


def _decide(
    basis: TernaryBasis, tokens: int, dtype: torch.dtype, has_weight: bool, forced: str | None
) -> tuple[str, str]:
    """(path, reason)."""
    if forced and forced != "auto":
        if forced not in PATHS:
            raise ValueError(
                f"RANDLORA_PATH must be auto, {', '.join(PATHS[:-1])} or {PATHS[-1]}, "
                f"got {forced!r}"
            )
        if forced == "merged" and not has_weight:
            return "delta", "RANDLORA_PATH asks for merged, but weight and adapter are apart"
        return forced, "RANDLORA_PATH asks for it"
    costs = predicted_costs(basis, tokens, has_weight)
    note = ""
    if has_weight and dtype in (torch.bfloat16, torch.float16):
        del costs["merged"]
        note = ", merged excluded because W + dW would lose small changes in 16 bits"
    return min(costs, key=costs.__getitem__), f"cheapest predicted{note}"
