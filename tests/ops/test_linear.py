"""`linear` against the plain PyTorch reference: float64 exactly, other types by the error rule."""

import pytest
import torch
from layer_cases import (
    BASES,
    CALLS,
    KINDS,
    NAMES,
    SCALED,
    SHAPES,
    SIXTEEN_BITS,
    WAYS,
    Layer,
    assert_rule,
    by_plain_torch,
    call,
    exact,
    largest_error,
    make_layer,
    ours,
    plain,
    relative,
    ways,
)

from randlora_ext import _C, Basis, devices
from randlora_ext.ops import functional, hadamard

TOKENS = [0, 1, 3, 16, 33, 100, 257]  # 257 needs a second super-block of the backward on 2 threads
FP64 = 1e-12  # relative; about 1e-13 is seen


# More of odd ones for Hadamard bases, whose transforms have sizes that are powers of two.
ODD = [
    (96, 288, 16), (768, 288, 32), (300, 420, 30), (61, 100, 6), (10, 11, 3), (1, 1, 4), (9, 7, 50),
    (40, 512, 2), (1, 37, 1), (129, 131, 8), (17, 700, 3),
]  # fmt: skip


def assert_exact(layer):
    oracle = exact(layer)
    for how, way in ways(layer).items():
        results = way(layer)
        for name in NAMES:
            assert results[name].shape == oracle[name].shape, (how, name)
            assert results[name].dtype == oracle[name].dtype, (how, name)
            error = largest_error(results[name], oracle[name])
            assert error <= FP64, f"{name} of {how} is off by {error:.3g}"


def assert_errs_as_plain(layer, floor):
    simple, oracle, dtype = plain(layer), exact(layer), layer.x.dtype
    for way in ways(layer).values():
        results = way(layer)
        assert [results[n].dtype for n in NAMES] == [dtype, dtype, *[torch.float32] * 2]
        assert_rule(results, simple, oracle, dtype, floor)


@pytest.mark.parametrize("basis", ["hadamard", SCALED])
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_hadamard_bases_of_odd_sizes(shape, basis):
    for tokens in (0, 1, 5, 130):
        assert_exact(make_layer(*shape, basis, tokens))
        for dtype in (torch.float32, *SIXTEEN_BITS):
            floor = 64 if min(shape[:2]) == 1 else 4  # all of dlam is one sum, which may cancel
            assert_errs_as_plain(make_layer(*shape, basis, tokens, dtype), floor)


@pytest.mark.parametrize("basis", [*BASES, SCALED])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64(shape, basis):
    for k, tokens in enumerate(TOKENS):
        layer = make_layer(*shape, basis, tokens, lead=(2,) if k % 3 == 0 else ())
        assert_exact(layer.without_weight() if (k + shape[0]) % 2 else layer)


@pytest.mark.parametrize("shape", [(530, 640, 16), (640, 530, 16), (1030, 520, 64)], ids=str)
@pytest.mark.parametrize("density", [1 / 3, 0.05])
def test_float64_beyond_one_chunk_of_planes(shape, density):
    # Planes are decoded 512 lines at a time, and 64 lines of output make a tile.
    assert_exact(make_layer(*shape, density, 33))


@pytest.mark.parametrize("basis", [*BASES, SCALED])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 8), (50, 37, 7), (37, 130, 16), (20, 24, 32)], ids=str)
def test_error_rule(shape, dtype, basis):
    # Dense bases may form W + dW: one GEMM on the sum rounds otherwise than the sum of two.
    floor = 1 if isinstance(basis, float) else 2
    for tokens, has_weight in ((1, True), (33, False), (33, True), (257, False)):
        layer = make_layer(*shape, basis, tokens, dtype)
        assert_errs_as_plain(layer if has_weight else layer.without_weight(), floor)


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


SQUARE, WIDE, TALL = (4096, 4096), (1024, 1152), (1152, 1024)
# Of a layer in float16: lambda, gamma, x, dy and the scaling.
ADAM = [(1e-4, 1 / 4096, 1, dy, 20.0) for dy in (1e-2, 1e-3, 1e-4)]  # first steps, loss scale one
UNEVEN = (1e-6, 1000 / 4096, 100, 1e-2, 20.0)  # diagonals that differ by nine powers of ten
# Elements of dW of size 0.1 sqrt(K) = 3.2, a hundred times what training reaches.
LARGE = (1, 0.1, 1, 1, 1.0)
SMALL = (2.5e-5, 1 / 256, 1, 1, 5e4)  # lambda * gamma of about float16's smallest number


@pytest.mark.parametrize("kind, sizes, r, tokens, how, numbers", [
    *(("hadamard", sizes, 32, 64, how, numbers) for numbers in (*ADAM, UNEVEN)
      for sizes in (SQUARE, WIDE, TALL) for how in WAYS if how == "kernels" or sizes != SQUARE),
    *(("dense", (1024, 1024), r, tokens, "kernels", numbers)
      for r, tokens in ((16, 64), (64, 300)) for numbers in (LARGE, SMALL)),
], ids=str)  # fmt: skip
def test_range_of_float16(kind, sizes, r, tokens, how, numbers):
    with_weight = make_layer(*sizes, r, kind, tokens, torch.float16)
    lam, gam, x, dy, with_weight.scaling = numbers
    with_weight.lam, with_weight.gam = with_weight.lam.sign() * lam, with_weight.gam.sign() * gam
    with_weight.x, with_weight.dy = with_weight.x * x, with_weight.dy * dy
    layers = [with_weight.without_weight()]
    if kind == "dense":
        layers.append(with_weight)
    for layer in layers:
        oracle, results = exact(layer), WAYS[how](layer)
        for which, want in oracle.items():
            assert results[which].isfinite().all(), which
            # dx itself may be smaller than what float16 holds.
            subnormal = results[which].dtype == torch.float16 and want.abs().max() < 2.0**-14
            bound = 2.0**-25 / want.square().mean().sqrt().item() if subnormal else 0.0
            assert relative(results[which], want) < 0.003 + bound, which


@pytest.mark.parametrize("sizes", [SQUARE, WIDE, TALL], ids=str)
def test_a_large_activation_in_float16_stays_finite(sizes):
    # Language models have activations of some thousands in a few features. lambda = 1 and
    # gamma = 1 / d, as at the start: y is small, and so must be everything between.
    layer = make_layer(*sizes, 32, "hadamard", 2, torch.float16).without_weight()
    layer.x[0], layer.x[0, 7], layer.dy[1], layer.scaling = 0, 5000, 0, 1.0
    layer.dy[0], layer.dy[1, 5] = layer.dy[0] / 100, 5000
    layer.lam.fill_(1), layer.gam.fill_(1 / layer.basis.d)
    oracle = exact(layer)
    for how in [*WAYS][: 1 if sizes == SQUARE else 2]:
        for name, value in WAYS[how](layer).items():
            assert value.isfinite().all(), (how, name)
            assert relative(value, oracle[name]) < 2e-3, (how, name)


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


# ---- Hadamard bases in plain torch, for devices without kernels


def test_plain_torch_computes_what_a_card_cannot_hold(monkeypatch):
    # On the CUDA kernels compiled for the CPU (CONTRIBUTING.md) this asks them: of these sizes
    # N is 65536.
    basis = Basis(33024, 33024, 256, kind="hadamard")
    if devices.has_cuda_kernels(torch.device("cpu")):
        assert functional.what_computes(basis, torch.device("cpu"), torch.float32) == "plain torch"
        x, lam = torch.randn(2, 33024), torch.randn(256, 129)
        gam = torch.zeros(129, 33024).index_fill(1, torch.arange(0, 33024, 511), 1 / 33024)
        layer = Layer(basis, x, None, None, lam, gam, torch.randn(2, 33024))
        for name, value in ours(layer).items():
            assert torch.equal(value, by_plain_torch(layer)[name]), name
    monkeypatch.setattr(hadamard, "has_cuda_kernels", lambda device: True)
    for fits, told in ((False, "plain torch"), (True, f"{_C.isa()} kernels")):
        monkeypatch.setattr(_C, "hadamard_fits", lambda *sizes, fits=fits: fits)
        assert functional.what_computes(basis, torch.device("cpu"), torch.float32) == told
    assert "nothing" in functional.what_computes(basis, torch.device("meta"), torch.float32)


def test_plain_torch_takes_the_scale_in_float64():
    layer = make_layer(9, 5, 2, "hadamard", 3, torch.float64)
    layer.scaling = 0.1
    torch.testing.assert_close(by_plain_torch(layer), ours(layer), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["linear", "linear_backward", "weight"])
def test_plain_torch_is_registered_for_every_other_device(name):
    has, name = torch._C._dispatch_has_kernel_for_dispatch_key, f"randlora::hadamard_{name}"
    assert has(name, "CompositeExplicitAutograd") and has(name, "CPU")
    table = torch._C._dispatch_dump_table(name).splitlines()
    for key in ("XPU", "MPS", "PrivateUse1"):
        (line,) = [line for line in table if line.startswith(f"{key}:")]
        assert "default backend kernel" in line, line
