"""The choice of a path: few tokens go through the bases, many through a dW that is formed first.

`python benchmarks/layer.py --paths` measures what the choice loses. RANDLORA_PATH overrides it.
"""

import math
import os
from typing import NamedTuple

import torch

from .. import devices
from ..basis import TernaryBasis

PATHS = ("factored", "delta", "merged")
MANY = 2**62  # tokens: more than any call has
# The fewest tokens for which dW is formed: Hadamard bases; independent ones in multiples of d
# (merged) and of d + D (delta). Measured on that processor, "other" on Zen 4; "cuda" is estimated.
LIMITS = {
    "amx": (4096, 2, 1),
    "zen5": (1024, MANY, 3),
    "other": (4096, 2, 3),
    "cuda": (MANY, 2, 1),
}


class PathChoice(NamedTuple):
    """The path of a call and the reason."""

    path: str
    reason: str
    isa: str
    b_side: str = "packed"  # of the factored path: from the packed B, or a GEMM on a dense B

    def __str__(self) -> str:
        dense = ", B side by GEMM on a dense B" if self.b_side == "dense" else ""
        return f"path {self.path} on {self.isa}{dense}: {self.reason}"


def explain(
    basis: TernaryBasis,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    has_weight: bool = True,
    dropout: float = 0.0,
) -> PathChoice:
    """The path that `linear(..., path="auto")` takes for `tokens` rows of x, and why.

    `merged` is excluded with dropout, since the adapter then sees another x than the base layer,
    and in 16 bits, since W + dW loses a dW below half an ulp of W. RANDLORA_PATH overrides it.

    Raises:
        ValueError: RANDLORA_PATH is none of auto, factored, delta, merged.
    """
    kind = torch.device(device).type
    has_weight = has_weight and dropout == 0.0
    path, b_side = choose("auto", basis, tokens, dtype, has_weight, kind)
    limit = formed_from(basis, dtype, has_weight, kind)
    if (forced := _from_environment("RANDLORA_PATH", PATHS)) != "auto":
        reason = f"RANDLORA_PATH asks for {forced}"
    elif limit == MANY:
        reason = "forming dW first is not known to cost less at any number of tokens"
    else:
        fewer = "fewer than" if tokens < limit else "at least"
        reason = f"{fewer} {limit} tokens, from which {_formed(dtype, has_weight)} costs less"
    if has_weight and dtype.itemsize == 2 and path != "merged":
        reason += "; merged is excluded because W + dW would lose small changes in 16 bits"
    return PathChoice(path, reason, devices.what_computes(basis.kind, kind), b_side)


def choose(
    path: str, basis: TernaryBasis, tokens: int, dtype: torch.dtype, has_weight: bool, device: str
) -> tuple[str, str]:
    """(path, B side); the path "auto" becomes that of `explain`.

    `tokens` may be symbolic: torch.compile guards on whether it reaches each limit. An exported
    program takes the factored path unless its whole declared range of tokens reaches the limit.
    """
    allowed = ("factored", "merged") if basis.kind == "hadamard" else PATHS
    if path not in ("auto", *allowed):
        raise ValueError(f"path must be one of {('auto', *allowed)}, got {path!r}")
    if path == "auto":
        path = _from_environment("RANDLORA_PATH", PATHS)
        path = "delta" if path == "merged" and not has_weight else path
        if path == "auto":
            formed = _at_least(tokens, formed_from(basis, dtype, has_weight, device))
            path = _formed(dtype, has_weight) if formed else "factored"
        elif path not in allowed:
            path = "factored"
    many = _at_least(tokens, dense_b_above(basis, device) + 1, unknown=True)
    return path, "dense" if path == "factored" and many else "packed"


def formed_from(basis: TernaryBasis, dtype: torch.dtype, has_weight: bool, device: str) -> int:
    """The number of tokens from which dW is formed first, or `MANY`.

    Never below 256, where the overhead of a call hides the saving. For dense bases it follows from
    multiply-adds per entry of dW: 3 * K to form it, which large GEMMs do in the time of 2 to 2.7 K.
    """
    merged, d, D = _formed(dtype, has_weight) == "merged", basis.d, basis.D
    hadamard, per_d, per_both = LIMITS[devices.CPU if device == "cpu" else "cuda"]
    if basis.kind == "hadamard":
        return hadamard if merged else MANY
    if basis.kind == "dense":
        factored = 3 * basis.K / D + (2 if basis.expand else 3) * basis.K / d
        saved = factored - (1 if merged else 3)  # products of a formed dW
        return max(256, math.ceil(2.5 * basis.K / saved)) if saved > 0 else MANY
    if basis.format == "lists" or not (merged or dtype.itemsize == 2):
        return MANY
    return min(MANY, max(256, per_d * d if merged else per_both * (d + D)))


def dense_b_above(basis: TernaryBasis, device: str) -> int:
    """Up to this many tokens a CUDA call is bound by reading B, and the packed form is smallest.

    RANDLORA_B_SIDE (packed, dense) overrides it on CUDA.
    """
    if basis.kind in ("dense", "hadamard") or not devices.cuda_serves(device):
        return MANY
    forced = _from_environment("RANDLORA_B_SIDE", ("packed", "dense"))
    if forced != "auto" or device != "cuda":
        return 0 if forced == "dense" else MANY
    return max(16, int(2 / basis.density)) if basis.format == "lists" else 16


def _formed(dtype: torch.dtype, has_weight: bool) -> str:
    return "merged" if has_weight and dtype.itemsize > 2 else "delta"


def _from_environment(variable: str, values: tuple[str, ...]) -> str:
    value = os.environ.get(variable) or "auto"
    if value not in ("auto", *values):
        raise ValueError(f"{variable} must be one of {('auto', *values)}, got {value!r}")
    return value


def _at_least(tokens: int, limit: int, unknown: bool = False) -> bool:
    """tokens >= limit, for a symbolic number too: torch.compile guards on the answer.

    Returns `unknown` if the token range of an exported program leaves the answer open.
    """
    if limit >= MANY or not torch.compiler.is_compiling():
        return limit < MANY and tokens >= limit  # a symbolic number is not known to be below MANY
    from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

    if not torch.compiler.is_exporting():
        return guard_or_false(tokens >= limit)
    may_reach = not statically_known_true(tokens < limit)
    return statically_known_true(tokens >= limit) or (unknown and may_reach)
