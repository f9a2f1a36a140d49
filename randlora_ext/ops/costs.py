"""The cost model: what each path adds to a training step, counted, and priced by rates.py.

The unit is T * D * d multiply-adds at the speed of a dense GEMM; a training step of a frozen linear
layer costs 2 units (forward and dx).
"""

import os

import torch

from .. import kernels
from ..basis import TernaryBasis
from .rates import rates

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
B_SIDES = ("packed", "dense")
# Up to this many tokens, or signed adds per element of B, a CUDA call is bound by reading the
# basis, and the packed form is the smallest.
PACKED_TOKENS = 16
PACKED_ADDS = 2

Term = tuple[float, dict[str, float]]  # GEMMs, in units; units of each rate


def path_terms(
    basis: TernaryBasis,
    tokens: int,
    device_type: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Term]:
    """For the factored and the delta path: GEMMs that it adds, and how often it pays each rate.

    The merged path is the delta path without its products x dW^T and dy dW.
    """
    density, K, d, D = basis.density, basis.K, basis.d, basis.D
    if basis.format == "blocks":
        by_classes = device_type == "cpu" and dtype.itemsize >= 4
        return _block_terms(basis, tokens, by_classes)
    if basis.format == "dense":
        return _dense_terms(basis, tokens)
    a_products, b_products = _products(basis)
    factored = {"a_side": a_products * density * K / D}
    b_gemms = 0.0
    if choose_b_side(basis, tokens, device_type) == "dense":
        b_gemms = b_products * K / d
    elif basis.format == "planes":
        factored["b_planes"] = b_products * K / d
    else:
        factored["b_lists"] = b_products * density * K / d
    entries = {
        "form_add": density**2 * K,
        "form_scatter": density * basis.r,
        "form_term": K,
        "form_entry": 1.0,
    }
    formation = {name: count / max(tokens, 1) for name, count in entries.items()}
    return {"factored": (b_gemms, factored), "delta": (3.0, formation)}


def _products(basis: TernaryBasis) -> tuple[int, int]:
    """How often the factored path multiplies by the A and by the B side in a training step.

    If d == out, forward computes U = x B and does not keep it: backward computes it again.
    """
    return (3, 2) if basis.expand else (3, 3)


def _block_terms(basis: TernaryBasis, tokens: int, by_classes: bool) -> dict[str, Term]:
    # The whole layer's: a slice's share of each product is its share of the layer's W.
    density, r, K, (d, D) = basis.density, basis.r, basis.K, basis.layer_features
    held = basis.chunks
    a_products, b_products = _products(basis)
    by_classes &= held is None or (held.first == 0 and basis.D == D)
    # If dW is formed, the gradient of lambda and gamma takes one product of each side.
    a_factored, a_formed = density * a_products, density
    if by_classes and d % r == 0 and r * density > 1:
        # csrc/torch/block_classes.cpp: V is computed again for the gradient of lambda, and mixing
        # costs about as much as 8 multiply-adds an element.
        a_factored, a_formed = (a_products + 1) / r + 32 / d, 2 / r + 24 / d
    factored = {"block": a_factored * K / D + density * b_products * K / d}
    formed = {
        "block": a_formed * K / D + density * K / d,
        "block_term": density**2 * K / max(tokens, 1),
        "block_entry": 1 / max(tokens, 1),
    }
    return {"factored": (0.0, factored), "delta": (2.0, formed)}


def _dense_terms(basis: TernaryBasis, tokens: int) -> dict[str, Term]:
    K, d, D, T = basis.K, basis.d, basis.D, max(tokens, 1)
    a_products, b_products = _products(basis)
    # A' is made twice and its gradient contracted once.
    entries = 3 * K / D / T
    factored = {"dense": a_products * K / D + b_products * K / d, "dense_entry": entries}
    # csrc/torch/linear.cpp: if dW is formed, the gradients of lambda and gamma come from dy^T x
    # or, if that is cheaper, from U and P.
    by_product = T * K * (D + d) > (T + K) * D * d
    gradient = K / T if by_product else K / D + K / d
    formed = {"dense": 2 * K / T + gradient, "dense_entry": entries + 2 / T}
    return {"factored": (0.0, factored), "delta": (2.0 + by_product, formed)}


def predicted_costs(
    basis: TernaryBasis,
    tokens: int,
    has_weight: bool,
    device_type: str = "cpu",
    dtype: torch.dtype = torch.float32,
    merged_rounding: str | None = None,
) -> dict[str, float]:
    """Training units (forward, dx, dlam, dgam) of each path beside the base layer's 2."""
    known = rates(device_type, dtype, basis.format)
    costs = {
        path: gemms + sum(getattr(known, name) * count for name, count in paid.items())
        for path, (gemms, paid) in path_terms(basis, tokens, device_type, dtype).items()
    }
    if has_weight:
        costs["merged"] = costs["delta"] - 2.0
        if dtype in SIXTEEN_BITS and merged_rounding == "stochastic":
            costs["merged"] += known.round_entry / max(tokens, 1)
    return costs


def choose_b_side(basis: TernaryBasis, tokens: int, device_type: str) -> str:
    """How to multiply by B: "packed" or, on CUDA and for block and dense bases, "dense" (a GEMM).

    A dense B in the dtype of x is made once and shared by all layers of the shape. The
    environment variable RANDLORA_B_SIDE (packed, dense) overrides the choice on CUDA.
    """
    if basis.format == "dense":
        return "dense"
    if not kernels.cuda_serves(device_type):
        return "dense" if basis.format == "blocks" else "packed"
    forced = os.environ.get("RANDLORA_B_SIDE")
    if forced and forced != "auto":
        if forced not in B_SIDES:
            raise ValueError(f"RANDLORA_B_SIDE must be auto, packed or dense, got {forced!r}")
        return forced
    if tokens <= PACKED_TOKENS:
        return "packed"
    if basis.format == "blocks":
        return "dense"
    few_adds = basis.format == "lists" and tokens * basis.density <= PACKED_ADDS
    return "packed" if device_type != "cuda" or few_adds else "dense"
