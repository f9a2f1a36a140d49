"""Strategies of the property tests, and the elementwise bound on their results.

HYPOTHESIS_PROFILE=deep tries thousands of examples a property, new ones at every run; without it
there are few, the same ones always.
"""

import os
from dataclasses import replace

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from layer_cases import Layer, dense_basis, exact, forward_backward, make_layer
from torch import Tensor

from randlora_ext import Basis
from randlora_ext.reference import linear_reference

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def examples(few: int, deep: int) -> settings:
    """How often a property is tried."""
    return settings(
        max_examples=deep if DEEP else few,
        deadline=None,
        derandomize=not DEEP,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


seeds = st.integers(0, 2**64 - 1)
features = st.one_of(st.integers(1, 20), st.integers(1, 140))
densities = st.one_of(
    st.floats(0.002, 1.0),
    # 1/8 is the largest density that is packed as lists.
    st.sampled_from([1.0, 1 / 3, 0.07, 1 / 64, 1 / 8, 0.12500000000000003, 2.0**-31]),
)


@st.composite
def bases(draw) -> Basis:
    kind = draw(st.sampled_from(["independent", "hadamard", "dense"]))
    sizes = draw(features), draw(features), draw(st.integers(1, 40))
    if kind == "dense":
        return dense_basis(*sizes, torch.float64)
    density = draw(densities) if kind == "independent" else None
    return Basis(*sizes, density, draw(seeds), kind)


layouts = st.sampled_from(["plain", "transposed", "strided", "cut", "first", "zero"])


def laid_out(t: Tensor, layout: str) -> Tensor:
    """`t` with other strides; memory between its elements holds NaN, which must not be read.

    "first" is a tensor whose rows all lie in the same place, "zero" is all zeros: other values.
    """
    if layout == "transposed" and t.dim() >= 2:
        return t.mT.contiguous().mT
    if layout == "strided":
        spread = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype)
        spread[..., ::2] = t
        return spread[..., ::2]
    if layout == "cut":  # starts one element into its memory, so that it is not aligned
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype)
        wide[..., 1:-2] = t
        return wide[..., 1:-2]
    if layout == "first" and t.shape[0] > 0:
        return t[:1].expand(t.shape)
    return torch.zeros_like(t) if layout == "zero" else t


@st.composite
def layers(draw) -> Layer:
    """A call of `linear` with any shape, layout, dtype, density and seed."""
    basis = draw(bases())
    dtype = draw(st.sampled_from(DTYPES))
    lead = draw(st.sampled_from([(), (), (2,), (3, 1), (0,)]))
    tokens = draw(st.one_of(st.integers(0, 70), st.sampled_from([1, 16, 32, 33, 130])))
    layer = make_layer(basis.in_features, basis.out_features, basis.r, 1.0, tokens, dtype, lead)
    layer = replace(layer, basis=basis, scaling=draw(st.sampled_from([1.0, 0.75, -2.0, 0.0])))
    diagonals = draw(st.sampled_from([*[layer.lam.dtype] * 3, *DTYPES]))
    layer = replace(layer, lam=layer.lam.to(diagonals), gam=layer.gam.to(diagonals))
    for name in ("x", "weight", "bias", "dy", "lam", "gam"):
        setattr(layer, name, laid_out(getattr(layer, name), draw(layouts)))
    parts = draw(st.sampled_from(["weight and bias", "weight", "adapter"]))
    if parts == "adapter":
        return layer.without_weight()
    return replace(layer, bias=None) if parts == "weight" else layer


def magnitudes(layer: Layer) -> dict[str, Tensor]:
    """The sum of the absolute values of every result's terms, to which rounding errors scale."""
    wide = layer.to(torch.float64)
    A, B = (t.abs() for t in layer.basis.dense(dtype=torch.float64))
    weight, bias = (None if t is None else t.abs() for t in (wide.weight, wide.bias))
    positive = replace(wide, x=wide.x.abs(), lam=wide.lam.abs(), gam=wide.gam.abs())
    positive.dy = wide.dy.abs()
    return forward_backward(
        lambda x, lam, gam: linear_reference(x, weight, bias, A, B, lam, gam, abs(layer.scaling)),
        positive,
    )


def assert_within(name: str, got: Tensor, want: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """|got - want| <= 16 eps of dtype * size, plus a bound for subnormals, at every element."""
    assert got.shape == want.shape, f"{name} is {tuple(got.shape)}, not {tuple(want.shape)}"
    info = torch.finfo(dtype)
    allowed = 16 * info.eps * size + 4000 * info.smallest_normal * info.eps
    error = (got.double() - want).abs()
    wrong = ~(error <= allowed)  # true for NaN, too
    assert not wrong.any(), f"{name} errs by {error[wrong]}, where {allowed[wrong]} are allowed"


def assert_all_within(results: dict[str, Tensor], layer: Layer) -> None:
    """Each by the dtype of x, in which it is computed, or by its own where that has fewer digits,
    as gradients of float32 diagonals beside a float64 x.
    """
    oracle, sizes = exact(layer), magnitudes(layer)
    for name, got in results.items():
        dtype = max(layer.x.dtype, got.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        assert_within(name, got, oracle[name], sizes[name], dtype)
