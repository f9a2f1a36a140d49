"""Operators on any shape, layout, dtype, density and seed, against the oracle in float64.

HYPOTHESIS_PROFILE=deep python -m pytest tests/ops/test_properties.py --hypothesis-show-statistics
"""

import basis_reference
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import ours
from property_cases import (
    DTYPES,
    EVERY_KIND,
    assert_all_within,
    assert_within,
    bases,
    densities,
    examples,
    laid_out,
    layers,
    layouts,
    seeds,
)

from randlora_ext import delta_weight
from randlora_ext.basis.ternary import generate_planes
from randlora_ext.reference import delta_weight_reference

ops = torch.ops.randlora


@examples(200, 4000)
@given(layer=layers(), threads=st.sampled_from([1, 1, 2]))
def test_linear(layer, threads):
    torch.set_num_threads(threads)
    results = ours(layer)
    assert results["y"].dtype == results["dx"].dtype == layer.x.dtype
    assert results["dlam"].dtype == layer.lam.dtype and results["dgam"].dtype == layer.gam.dtype
    assert_all_within(results, layer)


@st.composite
def diagonals(draw):
    """(basis, lam, gam, grad of dW): float64, float32, or 16-bit as after `module.half()`."""
    basis = draw(bases(EVERY_KIND))
    dtype = draw(st.sampled_from(DTYPES))
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shapes = ((basis.r, basis.n), (basis.n, basis.d), (basis.out_features, basis.in_features))
    normal = (torch.randn(s, generator=make, dtype=torch.float64).to(dtype) for s in shapes)
    return basis, *(laid_out(t, draw(layouts)) for t in normal)


def by_reference(basis, lam, gam, grad, absolute=False):
    """dW, dlam, dgam in float64; of the terms' magnitudes where `absolute`."""
    A, B = basis.dense(dtype=torch.float64)
    values = [A, B, *(t.double() for t in (lam, gam, grad))]
    A, B, lam, gam, grad = (t.abs() for t in values) if absolute else values
    leaves = [lam.requires_grad_(), gam.requires_grad_()]
    delta = delta_weight_reference(A, B, *leaves, 1.5, basis.out_features, basis.in_features)
    return [delta.detach(), *torch.autograd.grad(delta, leaves, grad)]


@examples(100, 3000)
@given(case=diagonals(), threads=st.sampled_from([1, 1, 2]))
def test_delta_weight(case, threads):
    torch.set_num_threads(threads)
    basis, lam, gam, grad = case
    leaves = [t.detach().requires_grad_() for t in (lam, gam)]
    delta = delta_weight(basis, *leaves, 1.5)
    results = [delta.detach(), *torch.autograd.grad(delta, leaves, grad)]
    wanted, sizes = by_reference(*case), by_reference(*case, absolute=True)
    for name, *each in zip(("dW", "dlam", "dgam"), results, wanted, sizes, strict=True):
        assert_within(name, *each, lam.dtype)


@examples(60, 2000)
@given(
    seed=seeds,
    role=st.sampled_from([0, 1, 3, 4, 5]),
    # Rows and columns go to 2^32, so that most slices lie beyond 2^31 elements of the matrix.
    row=st.integers(0, 2**32 - 8),
    col=st.integers(0, 2**32 - 150),
    rows=st.integers(1, 8),
    cols=st.integers(1, 150),
    density=densities,
)
def test_any_slice_is_the_specification(seed, role, row, col, rows, cols, density):
    planes = generate_planes(seed, role, row, rows, col, cols, density)
    got = ops.planes_to_dense(planes, cols, 1.0, torch.float32).numpy()
    at = np.arange(row, row + rows)[:, None], np.arange(col, col + cols)
    assert (got == basis_reference.ternary(seed, role, *at, density)).all()
    if cols % 64:  # bits past the last column are zero
        assert not (planes[..., -1] & ~((1 << cols % 64) - 1)).any()
