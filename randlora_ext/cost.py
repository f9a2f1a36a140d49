"""Which path a call takes, and why: a small model of the work each one does.

The unit is T * D * d multiply-adds at the speed of a dense GEMM; a frozen linear layer trains at 2
units (forward and dx). The constants are rough on purpose: they only have to rank three paths, and
`python benchmarks/layer.py --paths` shows how well they do.
"""

import os
from dataclasses import dataclass, field

import torch

from . import _C, cuda
from .basis import TernaryBasis

PATHS = ("factored", "delta", "merged")
B_SIDES = ("packed", "dense")


@dataclass(frozen=True)
class Rates:
    """Cost of our work on one kind of device, in multiply-adds of a dense GEMM there."""

    a_side: float  # a multiply-add of the structured products on gathered rows
    b_lists: float  # a signed add of the B side from lists
    b_planes: float  # the same from bit planes, decoding included; times density
    # Forming dW, per entry: adds of compact rows (density^2 * K of them), their scatter
    # (density * r), one term of a tensor-core product (K), and conversion with memory traffic.
    form_add: float
    form_scatter: float
    form_term: float
    form_entry: float
    # In a training step dW is formed twice and its gradient contracted once, at twice the cost.
    formations: float = 4.0


# Measured on 2 cores of an AVX-512 machine (EPYC, Zen 4).
CPU_LISTS = CPU_PLANES = Rates(1.0, 1.6, 1.9, 2.3, 17.0, 0.0, 45.0)
# Not measured: from the floors in csrc/cuda/*.cu for an H100 in bf16, where a GEMM does 325 T
# multiply-adds/s. A signed add gathers from L2. dW of 4096 x 4096 takes 25 us at 1/64 and 250 us
# at 0.07, by adds of compact rows; from planes it is a product by mma.sync, half as fast as a GEMM.
CUDA_LISTS = Rates(2.0, 83.0, 0.0, 230.0, 0.0, 0.0, 250.0)
CUDA_PLANES = Rates(2.0, 0.0, 2.0 * 3, 0.0, 0.0, 2.0, 480.0)
# Up to so many tokens, or adds for an element of B, a CUDA call is bound by reading the basis, and
# the packed one is the smallest. The same limits stand in csrc/cuda/linear.cu.
PACKED_TOKENS = 16
PACKED_ADDS = 2


@dataclass(frozen=True)
class PathChoice:
    """The path of a call, the reason, and the predicted units of each path."""

    path: str
    reason: str
    isa: str
    costs: dict[str, float] = field(default_factory=dict)
    b_side: str = "packed"  # of the factored path: from the packed B, or a GEMM on a dense B

    def __str__(self) -> str:
        costs = ", ".join(f"{p} {c:.2f}" for p, c in self.costs.items())
        b_side = ", B side by GEMM on a dense B" if self.b_side == "dense" else ""
        return (
            f"path {self.path} on {self.isa} kernels: {self.reason} "
            f"(predicted units beside the frozen layer's 2: {costs}{b_side})"
        )


def _rates(basis: TernaryBasis, device_type: str) -> Rates:
    if device_type == "cuda":
        return CUDA_PLANES if basis.format == "planes" else CUDA_LISTS
    return CPU_PLANES if basis.format == "planes" else CPU_LISTS


def predicted_costs(
    basis: TernaryBasis, tokens: int, has_weight: bool, device_type: str = "cpu"
) -> dict[str, float]:
    """Training units (forward, dx, dlam, dgam) of each path beside the base layer's 2."""
    density, K, d, D = basis.density, basis.K, basis.d, basis.D
    rates = _rates(basis, device_type)
    # Backward recomputes U: for d == in it needs it anyway, for d == out it is one product more.
    a_products, b_products = (3, 2) if basis.expand else (3, 3)
    b_add = density * (rates.b_planes if basis.format == "planes" else rates.b_lists)
    if choose_b_side(basis, tokens, device_type) == "dense":
        b_add = 1.0
    factored = K * (a_products * density * rates.a_side / D + b_products * b_add / d)
    form = (
        rates.form_add * density**2 * K
        + rates.form_scatter * density * basis.r
        + rates.form_term * K
        + rates.form_entry
    )
    formation = rates.formations * form / max(tokens, 1)
    costs = {"factored": factored, "delta": 3 + formation}
    if has_weight:
        costs["merged"] = 1 + formation
    return costs


def choose_b_side(basis: TernaryBasis, tokens: int, device_type: str) -> str:
    """How the factored path multiplies by B: "packed" or, on CUDA, "dense" (a GEMM).

    A dense B (D, K) in the dtype of x is made once and shared by all layers of the shape. The
    environment variable RANDLORA_B_SIDE (packed, dense) overrides the choice where the CUDA
    kernels compute.
    """
    if not cuda.serves(device_type):
        return "packed"
    forced = os.environ.get("RANDLORA_B_SIDE")
    if forced and forced != "auto":
        if forced not in B_SIDES:
            raise ValueError(f"RANDLORA_B_SIDE must be auto, packed or dense, got {forced!r}")
        return forced
    if device_type != "cuda" or tokens <= PACKED_TOKENS:
        return "packed"
    few_adds = basis.format == "lists" and tokens * basis.density <= PACKED_ADDS
    return "packed" if few_adds else "dense"


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
    kind = torch.device(device).type
    path, reason = _decide(basis, tokens, dtype, has_weight, kind, os.environ.get("RANDLORA_PATH"))
    return PathChoice(
        path,
        reason,
        _C.isa() if kind == "cpu" else kind,
        predicted_costs(basis, tokens, has_weight, kind),
        choose_b_side(basis, tokens, kind),
    )


def choose_path(
    basis: TernaryBasis, tokens: int, dtype: torch.dtype, has_weight: bool, device_type: str = "cpu"
) -> str:
    """`explain(...).path`, as `linear` asks for it at every call: decided once per size."""
    key = (tokens, dtype, has_weight, device_type, os.environ.get("RANDLORA_PATH"))
    decided: dict[tuple, str] = basis.__dict__.setdefault("_paths", {})
    if key not in decided:
        decided[key] = _decide(basis, *key)[0]
    return decided[key]


def _decide(
    basis: TernaryBasis,
    tokens: int,
    dtype: torch.dtype,
    has_weight: bool,
    device_type: str,
    forced: str | None,
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
    costs = predicted_costs(basis, tokens, has_weight, device_type)
    note = ""
    if has_weight and dtype in (torch.bfloat16, torch.float16):
        del costs["merged"]
        note = ", merged excluded because W + dW would lose small changes in 16 bits"
    return min(costs, key=costs.__getitem__), f"cheapest predicted{note}"
