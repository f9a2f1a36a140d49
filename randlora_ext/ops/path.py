"""The choice of a path: few tokens go through the bases, many through a dW that is formed first.

`python benchmarks/layer.py --paths` measures what the choice loses. RANDLORA_PATH overrides it.
"""

import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .. import _C, devices
from ..basis import TernaryBasis
from ..basis.tracing import living, run_while_tracing

PATHS = ("factored", "delta", "merged")
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
MANY = 2**62  # tokens: more than any call has

# Float32 Hadamard bases: W + dW is formed from this many tokens on.
_HADAMARD = {"cpu": 4096}


class _Rates(NamedTuple):
    """Costs in multiply-adds of a GEMM in the same dtype: they only have to rank two paths."""

    a: float  # a multiply-add of the A side
    b: float  # an element of the B side: of its non-zeros if lists, of all if planes
    # dW, which a step forms twice and contracts once, per entry:
    add: float  # an added row, density^2 * K of them
    scatter: float  # density * r
    term: float  # of a tensor-core product, K of them
    entry: float


# Measured on 2 cores of an EPYC with AVX-512; those of CUDA are estimates for an H100 in bf16.
_RATES = {
    ("cpu", 32, "lists"): _Rates(1.0, 2.0, 4.0, 117.0, 0.0, 66.0),
    ("cpu", 32, "planes"): _Rates(1.0, 0.36, 4.0, 117.0, 0.0, 66.0),
    ("cpu", 16, "lists"): _Rates(2.8, 9.7, 25.0, 406.0, 0.0, 750.0),
    ("cpu", 16, "planes"): _Rates(2.8, 1.5, 25.0, 406.0, 0.0, 750.0),
    ("cuda", 16, "lists"): _Rates(2.5, 102.0, 1130.0, 0.0, 0.0, 1230.0),
    ("cuda", 16, "planes"): _Rates(2.5, 2.5, 0.0, 0.0, 10.0, 2360.0),
}


@dataclass(frozen=True)
class PathChoice:
    """The path of a call and the reason."""

    path: str
    reason: str
    isa: str
    b_side: str = "packed"  # of the factored path: from the packed B, or a GEMM on a dense B

    def __str__(self) -> str:
        b_side = ", B side by GEMM on a dense B" if self.b_side == "dense" else ""
        return f"path {self.path} on {self.isa}{b_side}: {self.reason}"


class Limits(NamedTuple):
    """What decides: tokens from which dW is formed and how, and above which B is dense."""

    formed_from: int
    formed: str
    dense_b_above: int


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
    and in 16 bits, since W + dW loses a dW below half an ulp of W. The environment variable
    RANDLORA_PATH overrides the choice.

    Raises:
        ValueError: RANDLORA_PATH is none of auto, factored, delta, merged.
    """
    kind = torch.device(device).type
    has_weight = has_weight and dropout == 0.0
    path, b_side = choose("auto", basis, tokens, dtype, has_weight, kind)
    found = limits(basis, dtype, has_weight, kind)
    if os.environ.get("RANDLORA_PATH", "auto") not in ("", "auto"):
        reason = f"RANDLORA_PATH asks for {os.environ['RANDLORA_PATH']}"
    elif found.formed_from == MANY:
        reason = "it costs less for any number of tokens"
    else:
        fewer = "fewer than" if tokens < found.formed_from else "at least"
        reason = f"{fewer} {found.formed_from} tokens, from which {found.formed} costs less"
    if has_weight and dtype in SIXTEEN_BITS:
        reason += "; merged is excluded because W + dW would lose small changes in 16 bits"
    served = kind == "meta" or devices.serve(kind)
    isa = f"{_C.isa() if kind == 'cpu' else kind} kernels" if served else "plain torch"
    if not served and basis.format in ("lists", "planes"):
        isa = f"no kernels of ours for {kind}, which these bases need"
    if basis.kind == "dense":
        isa = "torch's GEMMs"
    return PathChoice(path, reason, isa, b_side)


def choose(
    path: str,
    basis: TernaryBasis,
    tokens: int,
    dtype: torch.dtype,
    has_weight: bool,
    device_type: str,
) -> tuple[str, str]:
    """(path, B side); the path "auto" becomes that of `explain`.

    `tokens` may be symbolic. torch.compile then guards on the side of each limit that tokens is on.
    An exported program must hold for every size, so it takes the factored path unless the declared
    range of T decides.
    """
    allowed = ("factored", "merged") if basis.kind == "hadamard" else PATHS
    if path not in ("auto", *allowed):
        raise ValueError(f"path must be one of {('auto', *allowed)}, got {path!r}")
    decided_by = dtype, has_weight, device_type
    if torch.compiler.is_compiling():
        found = _limits_while_tracing(basis.token, *decided_by)
    else:
        found = limits(basis, *decided_by)
    if path == "auto":
        forced = os.environ.get("RANDLORA_PATH") or "auto"
        if forced not in ("auto", *PATHS):
            raise ValueError(f"RANDLORA_PATH must be one of {('auto', *PATHS)}, got {forced!r}")
        if forced != "auto":
            path = _possible(forced, has_weight, allowed)
        else:
            path = found.formed if _at_least(tokens, found.formed_from) else "factored"
    many = _at_least(tokens, found.dense_b_above + 1, unknown=True)
    return path, "dense" if path == "factored" and many else "packed"


def _possible(forced: str, has_weight: bool, allowed: tuple[str, ...]) -> str:
    """RANDLORA_PATH, where a call cannot do it the nearest."""
    if forced == "merged" and not has_weight:
        forced = "delta"
    return forced if forced in allowed else "factored"


def _at_least(tokens: int, limit: int, unknown: bool = False) -> bool:
    if limit >= MANY:  # of which a symbolic number of tokens cannot be known to fall short
        return False
    if not torch.compiler.is_compiling():
        return tokens >= limit
    from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

    if not torch.compiler.is_exporting():
        return guard_or_false(tokens >= limit)
    if statically_known_true(tokens >= limit):
        return True
    return unknown and not statically_known_true(tokens < limit)


@run_while_tracing
def _limits_while_tracing(token: str, *decided_by) -> Limits:
    return limits(living(token), *decided_by)


def limits(basis: TernaryBasis, dtype: torch.dtype, has_weight: bool, device_type: str) -> Limits:
    key = dtype, has_weight, device_type, os.environ.get("RANDLORA_B_SIDE")
    if key not in basis.path_limits:
        basis.path_limits[key] = _find_limits(basis, dtype, has_weight, device_type)
    return basis.path_limits[key]


def _find_limits(
    basis: TernaryBasis, dtype: torch.dtype, has_weight: bool, device_type: str
) -> Limits:
    merged = has_weight and dtype not in SIXTEEN_BITS
    if basis.kind == "hadamard":
        formed_from = _HADAMARD.get(device_type, MANY) if merged else MANY
        return Limits(formed_from, "merged" if merged else "factored", MANY)
    density, K, d, D = basis.density, basis.K, basis.d, basis.D
    a_products, b_products = 3, 2 if basis.expand else 3  # if d == out, U = x B is computed twice
    dense_b_above = _dense_b_above(basis, device_type)
    if basis.kind == "dense":
        factored, forming = a_products * K / D + b_products * K / d, 3.0 * K + 200
    else:
        bits = 16 if device_type == "cuda" or dtype in SIXTEEN_BITS else 32
        rates = _RATES["cuda" if device_type == "cuda" else "cpu", bits, basis.format]
        element = rates.b * (density if basis.format == "lists" else 1)
        factored = rates.a * a_products * density * K / D
        factored += b_products * K / d * (1.0 if dense_b_above < MANY else element)
        forming = rates.add * density**2 * K + rates.scatter * density * basis.r
        forming += rates.term * K + rates.entry
    saved = factored - (1 if merged else 3)  # products of a formed dW
    formed_from = math.ceil(forming / saved) if saved > 0 else MANY
    return Limits(formed_from, "merged" if merged else "delta", dense_b_above)


def _dense_b_above(basis: TernaryBasis, device_type: str) -> int:
    """Up to this many tokens a CUDA call is bound by reading B, and the packed form is smallest.

    RANDLORA_B_SIDE (packed, dense) overrides it on CUDA.
    """
    if basis.kind == "dense" or not devices.cuda_serves(device_type):
        return MANY
    forced = os.environ.get("RANDLORA_B_SIDE") or "auto"
    if forced not in ("auto", "packed", "dense"):
        raise ValueError(f"RANDLORA_B_SIDE must be auto, packed or dense, got {forced!r}")
    if forced != "auto":
        return MANY if forced == "packed" else 0
    if device_type != "cuda":
        return MANY
    return max(16, int(2 / basis.density)) if basis.format == "lists" else 16
