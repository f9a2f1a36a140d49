"""The choice of a path by a small cost model.

The unit is T * D * d multiply-adds at the speed of a dense GEMM; a training step of a frozen linear
layer costs 2 units (forward and dx). `path_terms` counts the work of each path, and rates.py holds
its cost. `python benchmarks/layer.py --paths` measures what the choice loses.
"""

import os
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .. import _C, kernels
from ..basis import TernaryBasis
from ..basis.block import fits
from ..basis.description import as_signed
from ..basis.tracing import living, run_while_tracing
from .rates import rates

PATHS = ("factored", "delta", "merged")
ROUNDINGS = (None, "nearest", "stochastic")
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
B_SIDES = ("packed", "dense")


# Up to this many tokens, or signed adds per element of B, a CUDA call is bound by reading the
# basis, and the packed form is the smallest.
PACKED_TOKENS = 16
PACKED_ADDS = 2
MANY = 2**62  # tokens: more than any call has


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


def path_terms(
    basis: TernaryBasis,
    tokens: int,
    has_weight: bool,
    device_type: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, tuple[float, dict[str, float]]]:
    """By path: the GEMMs it adds, in units, and how many units of each rate it pays."""
    density, K, d, D = basis.density, basis.K, basis.d, basis.D
    if basis.format == "blocks":
        by_classes = device_type == "cpu" and dtype.itemsize >= 4
        return _block_terms(basis, tokens, has_weight, by_classes)
    if basis.format == "dense":
        return _dense_terms(basis, tokens, has_weight)
    # If d == out, forward computes U = x B and does not keep it: backward computes it again.
    a_products, b_products = (3, 2) if d == basis.in_features else (3, 3)
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
    terms = {"factored": (b_gemms, factored), "delta": (3.0, formation)}
    if has_weight:
        terms["merged"] = (1.0, formation)
    return terms


def _block_terms(
    basis: TernaryBasis, tokens: int, has_weight: bool, by_classes: bool
) -> dict[str, tuple[float, dict[str, float]]]:
    # Of the layer: a slice has as much less of each product as it has of the layer's W.
    density, r, K, (d, D) = basis.density, basis.r, basis.K, basis.layer_features
    held = basis.chunks
    a_products, b_products = (3, 2) if basis.expand else (3, 3)
    by_classes &= held is None or (held.first == 0 and basis.D == D)
    # Where dW is formed, the gradient of lambda and gamma takes one product of each side.
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
    terms = {"factored": (0.0, factored), "delta": (2.0, formed)}
    if has_weight:
        terms["merged"] = (0.0, formed)
    return terms


def _dense_terms(
    basis: TernaryBasis, tokens: int, has_weight: bool
) -> dict[str, tuple[float, dict[str, float]]]:
    K, d, D, T = basis.K, basis.d, basis.D, max(tokens, 1)
    a_products, b_products = (3, 2) if d == basis.in_features else (3, 3)
    # A' is made twice and its gradient contracted once.
    entries = 3 * K / D / T
    factored = {"dense": a_products * K / D + b_products * K / d, "dense_entry": entries}
    # csrc/torch/linear.cpp: where dW is formed, lambda and gamma get their gradient from dy^T x
    # or, if that is cheaper, from U and P.
    by_product = T * K * (D + d) > (T + K) * D * d
    gradient = K / T if by_product else K / D + K / d
    formed = {"dense": 2 * K / T + gradient, "dense_entry": entries + 2 / T}
    terms = {"factored": (0.0, factored), "delta": (2.0 + by_product, formed)}
    if has_weight:
        terms["merged"] = (0.0 + by_product, formed)
    return terms


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
        for path, (gemms, paid) in path_terms(basis, tokens, has_weight, device_type, dtype).items()
    }
    if has_weight and dtype in SIXTEEN_BITS and merged_rounding == "stochastic":
        costs["merged"] += known.round_entry / max(tokens, 1)
    return costs


def choose_b_side(basis: TernaryBasis, tokens: int, device_type: str) -> str:
    """How B is multiplied: "packed", or "dense" by a GEMM: on CUDA, and of block and dense bases.

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


def explain(
    basis: TernaryBasis,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    has_weight: bool = True,
    dropout: float = 0.0,
    merged_rounding: str | None = None,
) -> PathChoice:
    """The path that `linear(..., path="auto")` takes for `tokens` rows of x, and why.

    `merged` is excluded with dropout, since the adapter then sees another x than the base layer,
    and in 16 bits without `merged_rounding`, since W + dW loses a dW below half an ulp of W. The
    environment variable RANDLORA_PATH overrides the choice. Plain torch, in which block bases run
    on devices without our kernels, has the factored path alone.

    Raises:
        ValueError: RANDLORA_PATH is none of auto, factored, delta, merged; or merged_rounding none
            of None, "nearest", "stochastic".
    """
    check_rounding(merged_rounding)
    has_weight = has_weight and dropout == 0.0
    kind = torch.device(device).type
    if _in_plain_torch(basis, kind):
        ignored = "" if merged_rounding is None else "; merged_rounding is ignored"
        reason = f"our kernels do not serve this device{ignored}"
        costs = predicted_costs(basis, tokens, False, kind, dtype)
        return PathChoice("factored", reason, "plain torch", {"factored": costs["factored"]})
    forced = os.environ.get("RANDLORA_PATH")
    path, reason = _decide(basis, tokens, dtype, has_weight, kind, forced, merged_rounding)
    return PathChoice(
        path,
        reason,
        _C.isa() if kind == "cpu" else kind,
        predicted_costs(basis, tokens, has_weight, kind, dtype, merged_rounding),
        choose_b_side(basis, tokens, kind),
    )


def costs_told(basis: TernaryBasis, tokens: int, *options) -> str:
    """What dense bases cost beside the frozen layer's 2 units, and what cheaper ones would.

    Args:
        options: as those of `explain`.
    """
    sizes = basis.in_features, basis.out_features, basis.r
    others = {"units beside the frozen 2:": basis}
    others["density=0.07 would cost"] = TernaryBasis(*sizes, 0.07)
    if fits(8, *sizes):
        others["blocks of 1/8"] = TernaryBasis(*sizes, 1 / 8, kind="block")
    choices = {name: explain(other, tokens, *options) for name, other in others.items()}
    return ", ".join(f"{name} {c.costs[c.path]:.1f}" for name, c in choices.items())


def check_rounding(value: str | None) -> None:
    """Raises ValueError unless `value` is one of ROUNDINGS."""
    if value not in ROUNDINGS:
        raise ValueError(f"merged_rounding must be one of {ROUNDINGS}, got {value!r}")


def rounding_seed(basis: TernaryBasis, merged_rounding: str | None) -> int | None:
    """The operators' argument; a constant of compiled code."""
    return _seed_of(basis.token) if merged_rounding == "stochastic" else None


@run_while_tracing
def _seed_of(token: str) -> int:
    return as_signed(living(token).seed or 0)


def _in_plain_torch(basis: TernaryBasis, device_type: str) -> bool:
    """Whether `linear` runs ops/block_torch.py there; of "cuda" one may ask without a card."""
    if basis.kind != "block" or device_type == "meta" or kernels.serve(device_type):
        return False
    return device_type != "cuda" or torch.cuda.is_available()


class Region(NamedTuple):
    """A range of token counts with one choice, from the end of the region before to `last`."""

    last: int
    path: str
    b_side: str


def choose(
    path: str,
    basis: TernaryBasis,
    tokens: int,
    dtype: torch.dtype,
    has_weight: bool,
    device_type: str,
    merged_rounding: str | None = None,
) -> tuple[str, str]:
    """(path, `choose_b_side`), where a path of "auto" becomes that of `explain`.

    `tokens` may be symbolic. torch.compile then guards on the region that tokens is in, of which
    there are few: other sizes in it run the same code. An exported program must hold for every
    size, so it takes the factored path unless the declared range of T lies in one region.
    """
    # An explicit path does not ask the environment; the regions then tell the B side alone.
    forced = os.environ.get("RANDLORA_PATH") if path == "auto" else "factored"
    decided_by = dtype, has_weight, device_type, forced, merged_rounding
    if torch.compiler.is_compiling():
        chosen, b_side = _choose_while_tracing(basis, tokens, *decided_by)
    else:
        for region in path_regions(basis, *decided_by):
            if tokens <= region.last:
                break
        _, chosen, b_side = region
    return chosen if path == "auto" else path, b_side


def path_regions(
    basis: TernaryBasis,
    dtype: torch.dtype,
    has_weight: bool,
    device_type: str,
    forced: str | None = None,
    merged_rounding: str | None = None,
) -> tuple[Region, ...]:
    """The choice for every number of tokens, in ascending order; the last region has no end.

    Args:
        forced: a value of the environment variable RANDLORA_PATH.
    """
    decided_by = dtype, has_weight, device_type, forced, merged_rounding
    key = *decided_by, os.environ.get("RANDLORA_B_SIDE")
    if key not in basis.path_regions:
        basis.path_regions[key] = _find_regions(basis, *decided_by)
    return basis.path_regions[key]


def _find_regions(
    basis: TernaryBasis, dtype: torch.dtype, has_weight: bool, device_type: str, *rest: str | None
) -> tuple[Region, ...]:
    def at(tokens: int) -> tuple[str, str]:
        path, _ = _decide(basis, tokens, dtype, has_weight, device_type, *rest)
        # Others multiply by B at most in backward; how must not divide their regions.
        return path, choose_b_side(basis, tokens if path == "factored" else MANY, device_type)

    regions: list[Region] = []
    first = 1
    # The B side changes at these ends only. Between them the factored path costs the same for any
    # number of tokens and the others ever less, so no path comes back once it is left.
    for end in sorted({PACKED_TOKENS, int(PACKED_ADDS / basis.density), MANY}):
        while first <= end:
            choice = at(first)
            last = end
            if at(end) != choice:
                last = bisect_left(range(end), True, lo=first, key=lambda t: at(t) != choice) - 1
            if regions and regions[-1][1:] == choice:
                regions.pop()
            regions.append(Region(last, *choice))
            first = last + 1
    return tuple(regions)


@run_while_tracing
def _regions_of(token: str, *decided_by) -> tuple[Region, ...]:
    return path_regions(living(token), *decided_by)


def _choose_while_tracing(basis: TernaryBasis, tokens: int, *decided_by) -> tuple[str, str]:
    from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

    *regions, last = _regions_of(basis.token, *decided_by)
    exporting = torch.compiler.is_exporting()
    known = statically_known_true if exporting else guard_or_false
    for region in regions:
        if known(tokens <= region.last):
            return region.path, region.b_side
        if exporting and not known(tokens > region.last):
            return "factored", last.b_side
    return last.path, last.b_side


def _decide(
    basis: TernaryBasis,
    tokens: int,
    dtype: torch.dtype,
    has_weight: bool,
    device_type: str,
    forced: str | None,
    merged_rounding: str | None,
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
    costs = predicted_costs(basis, tokens, has_weight, device_type, dtype, merged_rounding)
    note = ""
    if has_weight and dtype in SIXTEEN_BITS:
        note = f", merged with W + dW rounded ({merged_rounding})"
        if merged_rounding is None:
            del costs["merged"]
            note = (
                ", merged excluded because W + dW would lose small changes in 16 bits "
                "(merged_rounding allows it)"
            )
    return min(costs, key=costs.__getitem__), f"cheapest predicted{note}"
