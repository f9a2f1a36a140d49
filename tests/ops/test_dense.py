"""Dense bases (PEFT's default): what only they have; test_linear.py and others try them, too."""

import pickle

import pytest
import torch
from layer_cases import (  # noqa: F401
    PATHS,
    SHAPES,
    SIXTEEN_BITS,
    assert_delta_weight,
    dense_basis,
    exact,
    largest_error,
    make_layer,
    one_thread,
    ours,
    rms_error,
)

from randlora_ext import TernaryBasis, explain, linear, merged_weight, scaled_basis
from randlora_ext.basis.dense import DenseMatrices
from randlora_ext.reference import delta_weight_reference, scaled_basis_reference


def dense_layer(n_in, n_out, r, tokens, dtype=torch.float64, **options):
    return make_layer(n_in, n_out, r, "dense", tokens, dtype, **options)


def test_float64_in_chunks_of_tokens():
    layer = dense_layer(32, 32, 1024, 8300)  # V (K, T) would take 68 MB
    oracle = exact(layer)
    for name, value in ours(layer, "factored").items():
        assert largest_error(value, oracle[name]) <= 1e-12, name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("r", [16, 64])
def test_float16_stays_in_range_at_full_size(r, path):
    # |lambda gamma| of 0.1 is a hundred times what training reaches: elements of dW are of size
    # 0.1 sqrt(K) = 3.2, those of y and dx of 100.
    layer = dense_layer(1024, 1024, r, 64, torch.float16)
    signs = layer.lam.sign(), layer.gam.sign()
    layer.lam, layer.gam, layer.scaling = signs[0], 0.1 * signs[1], 1.0
    if path != "merged":
        layer = layer.without_weight()
    oracle = exact(layer)
    for name, value in ours(layer, path).items():
        assert value.isfinite().all(), name
        assert rms_error(value, oracle[name]) < 3e-3, name


def test_float16_keeps_small_diagonals():
    # lambda * gamma of 1e-7, as early in training, is about float16's smallest number.
    layer = dense_layer(256, 256, 16, 40, torch.float16).without_weight()
    layer.lam, layer.gam, layer.scaling = layer.lam * 1e-4, layer.gam / 16, 5e4
    oracle = exact(layer)
    for path in ("factored", "delta"):
        results = ours(layer, path)
        assert all(rms_error(results[name], oracle[name]) < 2e-3 for name in results), path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_delta_weight(sizes, dtype):
    assert_delta_weight(dense_layer(*sizes, 0, dtype).cast(dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_merged_weight_is_rounded_once(sizes, dtype):
    layer = dense_layer(*sizes, 0, dtype)
    basis, wide = layer.basis, layer.cast(torch.float64)
    A, B = basis.dense(dtype=torch.float64)
    shape = basis.out_features, basis.in_features
    delta = delta_weight_reference(A, B, wide.lam, wide.gam, 0.5, *shape)
    total, eps = wide.weight + delta, torch.finfo(dtype).eps
    if dtype not in SIXTEEN_BITS:
        merged = merged_weight(basis, layer.weight, layer.lam, layer.gam, 0.5)
        assert rms_error(merged, total) < 4 * eps
        return
    half_ulp = 0.5 * eps * total.abs()
    # A' and B are rounded, too.
    before = 4 * eps * delta.norm() / delta.numel() ** 0.5 + 1e-2 * half_ulp
    for seed in (None, 5):
        merged = merged_weight(basis, layer.weight, layer.lam, layer.gam, 0.5, seed)
        allowed = before + (1 if seed is None else 2) * half_ulp + 1e-7
        assert ((merged.double() - total).abs() <= allowed).all()


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


def test_scaled_basis():
    basis = dense_basis(20, 33, 6, torch.float32)
    lam, gam = torch.randn(6, basis.n), torch.randn(basis.n, 20)
    wanted = scaled_basis_reference(basis.dense()[0], lam, gam)
    assert rms_error(scaled_basis(basis, lam, gam), wanted) < 1e-6


def test_choice_of_a_path():
    basis = dense_basis(1024, 1024, 32, torch.float32)
    assert explain(basis, 64).path == "factored"
    assert explain(basis, 4096).path == "merged"
    assert explain(basis, 4096, torch.bfloat16).path == "delta"
    assert explain(basis, 4096, dropout=0.1).path == "delta"
    assert explain(basis, 64).isa == "torch's GEMMs"


def good(dtype=torch.float32):
    layer = dense_layer(30, 40, 4, 2, dtype)
    return {k: getattr(layer, k) for k in ("x", "weight", "bias", "basis", "lam", "gam")}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "change, expected",
    [
        ({"x": torch.ones(2, 30).int()}, ["x", "int32", "floating"]),
        ({"x": torch.ones(2, 31)}, ["x", "in_features = 30", "(2, 31)"]),
        ({"weight": torch.ones(30, 40)}, ["weight", "(40, 30)", "(30, 40)"]),
        ({"weight": torch.ones(40, 30).double()}, ["weight", "float32", "float64"]),
        ({"weight": torch.ones(40, 30, device="meta")}, ["weight", "meta", "cpu"]),
        ({"weight": None}, ["bias", "without a weight"]),
        ({"bias": torch.ones(40, 1)}, ["bias", "(40,)", "(40, 1)"]),
        ({"bias": torch.ones(1)}, ["bias", "(40,)", "(1,)"]),  # torch would broadcast it
        ({"lam": torch.ones(4, 1)}, ["lam", "(4, 8)", "(4, 1)"]),
        ({"lam": torch.ones(4, 8).int()}, ["lam", "floating", "int32"]),
        ({"gam": torch.ones(1, 30)}, ["gam", "(8, 30)", "(1, 30)"]),
        ({"gam": torch.ones(8, 30, device="meta")}, ["gam", "meta", "cpu"]),
    ],
)
def test_errors(change, expected, path):
    with pytest.raises((ValueError, RuntimeError)) as raised:
        linear(**{**good(), **change}, path=path)
    assert all(text in str(raised.value) for text in expected), raised.value


def test_matrices_that_are_too_small():
    A, B = torch.ones(4, 20), torch.ones(30, 20)
    with pytest.raises(
        ValueError, match=r"A must be \(r, >= d\) = \(4, >= 21\) and B .*\(30, 20\)"
    ):
        TernaryBasis.from_dense(DenseMatrices(A, B), 21, 30)
