"""Dense bases (PEFT's default): what only they have; test_linear.py and others try them, too."""

import pickle

import pytest
import torch
from layer_cases import exact, largest_error, make_layer, ours, rms_error

from randlora_ext import TernaryBasis
from randlora_ext.basis.dense import DenseMatrices


def test_float64_in_chunks_of_tokens():
    layer = make_layer(32, 32, 1024, "dense", 8300)  # V (K, T) would take 68 MB
    oracle = exact(layer)
    for name, value in ours(layer, "factored").items():
        assert largest_error(value, oracle[name]) <= 1e-12, name


@pytest.mark.parametrize(("r", "path"), [(16, "factored"), (64, "delta"), (16, "merged")])
def test_float16_stays_in_range_at_full_size(r, path):
    # |lambda gamma| of 0.1 is a hundred times what training reaches: elements of dW are of size
    # 0.1 sqrt(K) = 3.2, those of y and dx of 100.
    layer = make_layer(1024, 1024, r, "dense", 64, torch.float16)
    signs = layer.lam.sign(), layer.gam.sign()
    layer.lam, layer.gam, layer.scaling = signs[0], 0.1 * signs[1], 1.0
    if path != "merged":
        layer = layer.without_weight()
    oracle = exact(layer)
    for name, value in ours(layer, path).items():
        assert value.isfinite().all(), name
        assert rms_error(value, oracle[name]) < 3e-3, name


def test_bases_are_views_of_the_matrices_and_one_copy_in_another_dtype():
    A, B = torch.rand(4, 40), torch.rand(60, 40)
    matrices = DenseMatrices(A, B)
    one, other = (TernaryBasis.from_dense(matrices, *sizes) for sizes in ((40, 60), (50, 20)))
    turned = one.transposed()
    for basis in (one, other, turned):
        a, b = basis.packed()
        assert (a.shape, b.shape) == ((4, basis.d), (basis.D, basis.K))
        assert a.data_ptr() == A.data_ptr() and b.data_ptr() == B.data_ptr()
        assert basis.dense_b("cpu", torch.float32).data_ptr() == B.data_ptr()
    copies = {basis.dense_b("cpu", torch.bfloat16).data_ptr() for basis in (one, other, turned)}
    assert len(copies) == 1
    dense = one.dense()
    assert torch.equal(dense[0], A) and dense[0].data_ptr() != A.data_ptr()
    assert (one.kind, one.format, one.description, one.seed) == ("dense", "dense", None, None)
    assert "dense" in repr(one)
    again = pickle.loads(pickle.dumps(one))
    assert torch.equal(again.packed()[1], B)


def test_matrices_that_are_too_small():
    A, B = torch.ones(4, 20), torch.ones(30, 20)
    with pytest.raises(
        ValueError, match=r"A must be \(r, >= d\) = \(4, >= 21\) and B .*\(30, 20\)"
    ):
        TernaryBasis.from_dense(DenseMatrices(A, B), 21, 30)
