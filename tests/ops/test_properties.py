"""Operators on any shape, layout, dtype, density and seed, against the oracle in float64.

HYPOTHESIS_PROFILE=deep python -m pytest tests/ops/test_properties.py --hypothesis-show-statistics
"""

import basis_reference
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import ours
from property_cases import assert_all_within, densities, examples, layers, seeds

from randlora_ext._C import threshold
from randlora_ext.basis.description import as_signed

ops = torch.ops.randlora


@examples(200, 4000)
@given(layer=layers(), threads=st.sampled_from([1, 1, 2]))
def test_linear(layer, threads):
    torch.set_num_threads(threads)
    results = ours(layer)
    assert results["y"].dtype == results["dx"].dtype == layer.x.dtype
    assert results["dlam"].dtype == layer.lam.dtype and results["dgam"].dtype == layer.gam.dtype
    assert_all_within(results, layer)


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
    planes = torch.empty(2, rows, -(-cols // 64), dtype=torch.int64)
    ops.fill_planes_(planes, as_signed(seed), role, row, col, cols, threshold(density))
    got = ops.planes_to_dense(planes, cols, 1.0, torch.float32).numpy()
    at = np.arange(row, row + rows)[:, None], np.arange(col, col + cols)
    assert (got == basis_reference.ternary(seed, role, *at, density)).all()
    if cols % 64:  # bits past the last column are zero
        assert not (planes[..., -1] & ~((1 << cols % 64) - 1)).any()
