"""The choice of a path: the cheapest by costs.py, unless the caller or the environment decides.

`python benchmarks/layer.py --paths` measures what the choice loses.
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
from .costs import PACKED_ADDS, PACKED_TOKENS, SIXTEEN_BITS, choose_b_side, predicted_costs

PATHS = ("factored", "delta", "merged")
ROUNDINGS = (None, "nearest", "stochastic")
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
    on devices without our kernels, has only the factored path.

    Raises:
        ValueError: RANDLORA_PATH is none of auto, factored, delta, merged; or merged_rounding is
            none of None, "nearest", "stochastic".
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
    """The operators' ``rounding_seed``; a constant in compiled code."""
    return _seed_of(basis.token) if merged_rounding == "stochastic" else None


@run_while_tracing
def _seed_of(token: str) -> int:
    return as_signed(living(token).seed or 0)


def _in_plain_torch(basis: TernaryBasis, device_type: str) -> bool:
    """Whether `linear` runs ops/block_torch.py there; not for "cuda" if there is no card."""
    if basis.kind != "block" or device_type == "meta" or kernels.serve(device_type):
        return False
    return device_type != "cuda" or torch.cuda.is_available()


class Region(NamedTuple):
    """A range of token counts with one choice, from the end of the previous region to `last`."""

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
    """(path, B side); the path "auto" becomes that of `explain`.

    `tokens` may be symbolic. torch.compile then guards on the region that tokens is in. There are
    few regions, and all sizes in one run the same code. An exported program must hold for every
    size, so it takes the factored path unless the declared range of T lies in one region.
    """
    # An explicit path ignores RANDLORA_PATH; the regions then only tell the B side.
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
        # Other paths multiply by B at most in backward; the B side must not split their regions.
        return path, choose_b_side(basis, tokens if path == "factored" else MANY, device_type)

    regions: list[Region] = []
    first = 1
    # The B side changes at these ends only. Between them the factored path costs the same for any
    # number of tokens and the others ever less, so a path that was left does not return.
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
