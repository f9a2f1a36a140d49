"""`linear` against the plain PyTorch reference: float64 exactly, other types by the error rule."""

import pytest
import torch
from layer_cases import (
    BASES,
    CALLS,
    KINDS,
    NAMES,
    SHAPES,
    SIXTEEN_BITS,
    assert_rule,
    call,
    exact,
    largest_error,
    make_layer,
    ours,
    plain,
    rms_error,
)

TOKENS = [0, 1, 3, 16, 33, 100, 257]  # 257 needs a second super-block of the backward on 2 threads
FP64 = 1e-12  # relative; about 1e-13 is seen


def assert_exact(layer):
    oracle, results = exact(layer), ours(layer)
    for name in NAMES:
        assert results[name].shape == oracle[name].shape, name
        assert results[name].dtype == oracle[name].dtype, name
        error = largest_error(results[name], oracle[name])
        assert error <= FP64, f"{name} is off by {error:.3g}"


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64(shape, basis):
    for k, tokens in enumerate(TOKENS):
        layer = make_layer(*shape, basis, tokens)
        assert_exact(layer.without_weight() if (k + shape[0]) % 2 else layer)


@pytest.mark.parametrize("shape", [(530, 640, 16), (640, 530, 16), (1030, 520, 64)], ids=str)
@pytest.mark.parametrize("density", [1 / 3, 0.05])
def test_float64_beyond_one_chunk_of_planes(shape, density):
    # Planes are decoded 512 lines at a time, and 64 lines of output make a tile.
    assert_exact(make_layer(*shape, density, 33))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 8), (50, 37, 7), (37, 130, 16), (20, 24, 32)], ids=str)
def test_error_rule(shape, dtype, basis):
    for tokens, has_weight in ((1, True), (33, False), (33, True), (257, False)):
        layer = make_layer(*shape, basis, tokens, dtype)
        layer = layer if has_weight else layer.without_weight()
        results = ours(layer)
        assert [results[n].dtype for n in NAMES] == [dtype, dtype, *[torch.float32] * 2]
        # Dense bases may form W + dW: one GEMM on the sum rounds otherwise than the sum of two.
        floor = 2 if basis == "dense" else 1
        assert_rule(results, plain(layer), exact(layer), dtype, floor)


@CALLS
def test_error_rule_with_many_tokens(basis):
    # A running float32 sum over T tokens would err by sqrt(T) roundings.
    layer = make_layer(64, 64, 8, basis, 8192, torch.float32)
    assert_rule(ours(layer), plain(layer), exact(layer), torch.float32)


@CALLS
def test_one_dimensional_x_is_one_token(basis):
    layer = make_layer(50, 37, 7, basis, 1)
    y = call(layer, x=layer.x[0])
    assert y.shape == (37,) and torch.equal(y, call(layer)[0])


@pytest.mark.parametrize("kind", ["hadamard", "dense"])
def test_float16_keeps_small_diagonals(kind):
    # lambda * gamma of 1e-7, as early in training, is about float16's smallest number.
    layer = make_layer(256, 300, 16, kind, 40, torch.float16).without_weight()
    layer.lam, layer.gam, layer.scaling = layer.lam * 1e-4, layer.gam / 16, 5e4
    oracle = exact(layer)
    for name, value in ours(layer).items():
        assert rms_error(value, oracle[name]) < 2e-3, name


@pytest.mark.parametrize("wanted", ["x", "lam gam", "lam", "gam", "x gam", "weight", "bias"])
def test_only_what_is_asked_for_gets_a_gradient(wanted):
    for basis in KINDS:
        layer = make_layer(37, 50, 7, basis, 6, lead=(3,))
        dy, x = layer.dy.flatten(0, 1), layer.x.flatten(0, 1)
        oracle = exact(layer) | {"dweight": dy.T @ x, "dbias": dy.sum(0)}
        leaves = {
            name: getattr(layer, name).clone().requires_grad_(name in wanted.split())
            for name in ("x", "weight", "bias", "lam", "gam")
        }
        call(layer, **leaves).backward(layer.dy)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in wanted.split()), name
            if leaf.grad is not None:
                assert largest_error(leaf.grad, oracle[f"d{name}"]) <= FP64, name
