"""Dense bases (PEFT's default) against the plain PyTorch reference."""

import pickle

import pytest
import torch
from layer_cases import (  # noqa: F401
    SHAPES,
    SIXTEEN_BITS,
    assert_delta_weight,
    assert_rule,
    dense_basis,
    exact,
    largest_error,
    make_layer,
    one_thread,
    ours,
    plain,
    rms_error,
)

from randlora_ext import TernaryBasis, delta_weight, explain, linear, merged_weight, scaled_basis
from randlora_ext.basis.dense import DenseMatrices
from randlora_ext.ops.costs import predicted_costs
from randlora_ext.reference import delta_weight_reference, scaled_basis_reference

PATHS = ["factored", "delta", "merged"]


def dense_layer(n_in, n_out, r, tokens, dtype=torch.float64, **options):
    return make_layer(n_in, n_out, r, 1.0, tokens, dtype, kind="dense", **options)


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_float64(sizes):
    for tokens in (0, 1, 3, 17, 200):  # the last takes dlam and dgam from dy^T x
        whole = dense_layer(*sizes, tokens)
        for layer in (whole, whole.without_weight()):
            oracle = exact(layer)
            for path in PATHS:
                if path == "merged" and layer.weight is None:
                    continue
                for name, value in ours(layer, path).items():
                    assert value.shape == oracle[name].shape, (path, name)
                    error = largest_error(value, oracle[name])
                    assert error <= 1e-12, f"{name} by {path} is off by {error:.3g}"


def test_float64_in_chunks_of_tokens():
    layer = dense_layer(32, 32, 1024, 8300)  # V (K, T) would take 68 MB
    oracle = exact(layer)
    for name, value in ours(layer, "factored").items():
        assert largest_error(value, oracle[name]) <= 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("sizes", [s for s in SHAPES if min(s) > 1 or s[0] > 9], ids=str)
def test_error_rule(sizes, dtype):
    for tokens in (1, 33, 200):
        whole = dense_layer(*sizes, tokens, dtype, lead=(2,))
        for layer in (whole, whole.without_weight()):
            oracle, simple = exact(layer), plain(layer)
            for path in ("factored", "delta"):
                assert_rule(ours(layer, path), simple, oracle, dtype)
        if dtype is torch.float32:
            assert_rule(ours(whole, "merged"), plain(whole), exact(whole), dtype, floor=2)


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


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_stochastic_rounding_keeps_small_changes(dtype):
    layer = dense_layer(96, 64, 8, 0, dtype)
    basis, weight = layer.basis, torch.ones(64, 96, dtype=dtype)
    delta = delta_weight(basis, layer.lam, layer.gam)
    scaling = torch.finfo(dtype).eps / 8 / delta.abs().max().item()
    seeds = range(200)
    total = sum(
        merged_weight(basis, weight, layer.lam, layer.gam, scaling, seed).double() for seed in seeds
    )
    kept = (total / len(seeds) - 1).flatten() @ delta.double().flatten()
    assert abs(kept / (scaling * delta.double().square().sum()) - 1) < 0.1
    assert torch.equal(merged_weight(basis, weight, layer.lam, layer.gam, scaling), weight)


def test_merged_rounding_repeats_in_backward():
    layer = dense_layer(64, 96, 8, 400, torch.bfloat16)
    args = layer.weight, layer.bias, layer.basis, layer.lam, layer.gam, layer.scaling
    for rounding, seed in (("nearest", None), ("stochastic", 0)):
        x = layer.x.clone().requires_grad_()
        y = linear(x, *args, path="merged", merged_rounding=rounding)
        y.backward(layer.dy)
        merged = merged_weight(layer.basis, layer.weight, layer.lam, layer.gam, 0.75, seed)
        assert torch.equal(y, torch.nn.functional.linear(layer.x, merged, layer.bias))
        assert torch.equal(x.grad, layer.dy @ merged)


def test_bases_are_views_of_the_matrices_and_one_copy_in_another_dtype():
    A, B = torch.rand(4, 40), torch.rand(60, 40)
    matrices = DenseMatrices(A, B)
    one, other = (TernaryBasis.of_dense(matrices, *sizes) for sizes in ((40, 60), (50, 20)))
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
    assert explain(basis, 4096, torch.bfloat16, merged_rounding="nearest").path == "merged"
    assert explain(basis, 4096, dropout=0.1).path == "delta"
    costs = predicted_costs(basis, 10**9, True)
    assert [round(costs[path]) for path in PATHS] == [5, 3, 1]


def test_errors():
    ops, lam, gam = torch.ops.randlora, torch.ones(4, 5), torch.ones(5, 20)
    A, B, x = torch.ones(4, 20), torch.ones(30, 20), torch.ones(2, 20)

    def call(*packed, **kwargs):
        return ops.linear(x, None, None, lam, gam, list(packed), 1.0, 30, "factored", **kwargs)

    assert call(A, B).shape == (2, 30)
    for packed, message in (
        ((A,), r"packed must hold 2 tensors \(dense A and B\), got 1"),
        ((A, B, B), r"packed must hold 2 tensors \(dense A and B\), got 3"),
        ((A[:, :19], B), r"the dense A must be \(r, d\) = \(4, 20\), got \(4, 19\) float32"),
        ((A[:3], B), r"lam must be \(r, n\) = \(3, 7\), got \(4, 5\)"),
        ((A, B[:29]), r"the dense B must be a floating \(D, K\) = \(30, 20\), got \(29, 20\)"),
        ((A, B[:, :, None]), r"the dense B must be a floating \(D, K\)"),
        ((A, B.int()), r"the dense B must be a floating .*, got \(30, 20\) int32"),
        ((A[:0], B), "a must not be empty"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*packed)
    with pytest.raises(
        ValueError, match=r"A must be \(r, >= d\) = \(4, >= 21\) and B .*\(30, 20\)"
    ):
        TernaryBasis.of_dense(DenseMatrices(A, B), 21, 30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_compile_and_vmap(dtype):
    layer = dense_layer(20, 33, 6, 7, dtype)
    packed = layer.basis.packed()
    for path in PATHS:
        args = layer.x, layer.weight, layer.bias, layer.lam, layer.gam, packed, 0.5, 33, path
        torch.library.opcheck(torch.ops.randlora.linear, args)

    def call(x, lam):
        return linear(x, layer.weight, layer.bias, layer.basis, lam, layer.gam)

    fast = torch.compile(call, fullgraph=True)
    assert torch.equal(fast(layer.x, layer.lam), call(layer.x, layer.lam))
    lams = torch.stack([layer.lam, 2 * layer.lam])
    both = torch.func.vmap(call, in_dims=(None, 0))(layer.x, lams)
    assert torch.equal(both[1], call(layer.x, lams[1]))
