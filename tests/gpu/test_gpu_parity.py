"""Every operator on the card against the CPU kernels and the fp64 oracle, over ragged shapes."""

from itertools import product

import pytest
import torch
from gpu_helpers import (
    ALL_TYPES,
    DENSITIES,
    NAMES,
    PATHS,
    SHAPES,
    assert_parity,
    cpu_kernels,
    on_both,
    ops,
    run_linear,
    run_linear_by_cpu_kernels,
    same,
)
from layer_cases import exact, largest_error, make_layer, plain, rms_error

from randlora_ext import merged_weight
from randlora_ext.ops.ternary import operands

pytestmark = pytest.mark.gpu
FP64 = 1e-12
# Of 16-bit floats the largest multiple of the layer's sizes that their range allows is far away.
LOW = [torch.float32, torch.bfloat16, torch.float16]
# in, out, r: r divides d or not; rows of B that repeat; r > d; a row of more than 1,024 numbers
HADAMARD = [(64, 96, 8), (130, 70, 7), (61, 300, 7), (20, 24, 32), (1, 1, 1), (1100, 1300, 32)]
SMALL = [(64, 64, 8), (50, 37, 7), (37, 130, 16), (20, 24, 32)]
OTHERS = [*product(["hadamard"], HADAMARD), *product(["dense"], SHAPES)]


def per_path(function):
    return pytest.mark.parametrize("path, b_side", PATHS, ids=lambda v: str(v))(function)


def exists(basis, path, b_side="packed"):
    """Hadamard bases have no path 'delta', and they and dense bases one B side."""
    return isinstance(basis, float) or b_side == "packed" and (basis, path) != ("hadamard", "delta")


# ---- linear


@per_path
@pytest.mark.parametrize("basis, shape", [*product(DENSITIES, SHAPES), *OTHERS], ids=str)
def test_linear_in_float64(device, shape, basis, path, b_side):
    if not exists(basis, path, b_side):
        return
    for tokens in (0, 1, 5, 17, 33, 130):
        whole = make_layer(*shape, basis, tokens)
        for layer in (whole, whole.without_weight()):
            if layer.weight is None and path == "merged":
                continue
            want = run_linear_by_cpu_kernels(layer, path)
            got = run_linear(layer, path, b_side, device)
            for name in NAMES:
                assert got[name].shape == want[name].shape, name
                assert largest_error(got[name], want[name]) <= FP64, (name, tokens)


@per_path
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("basis, shape", [*product(DENSITIES, SMALL), *OTHERS], ids=str)
def test_linear_by_the_error_rule(device, shape, basis, dtype, path, b_side):
    if not exists(basis, path, b_side) or basis == "dense" and min(shape) == 1:
        return
    for tokens in (1, 16, 33, 130):
        whole = make_layer(*shape, basis, tokens, dtype)
        for layer in (whole, whole.without_weight())[: 1 + isinstance(basis, float)]:
            if path == "merged" and (layer.weight is None or dtype is not torch.float32):
                continue  # in 16 bits W + dW rounds what the others keep
            # One GEMM on the sum, and a GEMM's own B: one rounding more.
            floor = 2 if path == "merged" or basis == "dense" else 1
            assert_parity(run_linear(layer, path, b_side, device), layer, path, floor)


@per_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 48, 8), (48, 64, 8), (256, 192, 16)], ids=str)
def test_16_bits_err_less_than_plain_pytorch(device, shape, dtype, path, b_side):
    # The rule allows twice its error, and an eps on top. docs/cuda.md has what is seen.
    if path == "merged":
        return  # W + dW rounds what the others keep
    for density in (1 / 3, 0.07):
        layer = make_layer(*shape, density, 64, dtype)
        got, oracle, simple = run_linear(layer, path, b_side, device), exact(layer), plain(layer)
        for name in NAMES:
            assert rms_error(got[name], oracle[name]) <= rms_error(simple[name], oracle[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape, basis",
    [
        *((shape, 1 / 3) for shape in [(64, 64, 8), (50, 37, 7), (37, 130, 16)]),
        *((shape, "hadamard") for shape in HADAMARD[:4]),
        ((50, 37, 7), "dense"),
    ],
    ids=str,
)
def test_merged_in_16_bits(device, shape, basis, dtype):
    layer = make_layer(*shape, basis, 33, dtype)
    got = run_linear(layer, "merged", "packed", device)
    want = run_linear_by_cpu_kernels(layer, "merged")
    # The sums of dW differ in their order: an ulp of W + dW may differ.
    for name in NAMES:
        assert rms_error(got[name], want[name]) <= 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("b_side", ["packed", "dense"])
@pytest.mark.parametrize("density", [1 / 3, 0.07])
def test_no_element_is_wrong_in_a_larger_layer(device, density, b_side):
    # A wrong tile among many would hide in a norm. Float32: the largest difference of all.
    for shape in ((300, 520, 24), (520, 300, 24)):
        layer = make_layer(*shape, density, 150, torch.float32)
        want = run_linear_by_cpu_kernels(layer, "factored")
        got = run_linear(layer, "factored", b_side, device)
        for name in NAMES:
            assert largest_error(got[name], want[name]) <= 2e-5, name


@pytest.mark.slow
def test_linear_with_32_bit_positions(device):
    for shape, density in (((65537, 2, 2), 0.02), ((2, 65540, 2), 1 / 3)):
        layer = make_layer(*shape, density, 2)
        got = run_linear(layer, "factored", "packed", device)
        want = run_linear_by_cpu_kernels(layer, "factored")
        assert all(largest_error(got[n], want[n]) <= FP64 for n in NAMES)


# ---- delta_weight, merged_weight, scaled_basis


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 520, 24), (520, 300, 24)], ids=str)
def test_delta_weight(device, shape, density):
    layer = make_layer(*shape, density, 1)
    basis = layer.basis
    sizes = (basis.out_features, basis.in_features)
    grad = torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def both(lam, gam, g):
        bases = operands(basis, lam.device, 0.75)
        dW = ops.delta_weight(lam, gam, *bases)
        return (dW, *ops.delta_weight_backward(g, lam, gam, *bases))

    for dtype in ALL_TYPES:
        inputs = [t.to(dtype) for t in (layer.lam, layer.gam, grad)]
        got, by_cpu = on_both(device, both, *inputs)
        with cpu_kernels():
            oracle = both(*(t.double() for t in inputs))
        eps = torch.finfo(dtype).eps
        for name, a, b, want in zip(("dW", "dlam", "dgam"), got, by_cpu, oracle, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            if dtype is torch.float64:
                assert largest_error(a, want) <= FP64, name
            else:  # tiles add in another order than rows: float32 sums of K terms
                floor = (4 if dtype is torch.float32 else 1) * eps
                assert rms_error(a, want) <= 2 * rms_error(b, want) + floor, (name, dtype)
                assert largest_error(a, want) <= 4 * largest_error(b, want) + floor, (name, dtype)


@pytest.mark.parametrize("seed", [None, 7], ids=["to nearest", "stochastic"])
@pytest.mark.parametrize("dtype", ALL_TYPES, ids=str)
@pytest.mark.parametrize("basis", [1 / 3, 0.07, "hadamard"])
@pytest.mark.parametrize("shape", [(50, 37, 7), (37, 50, 7), (72, 136, 8)], ids=str)
def test_merged_weight(device, shape, basis, dtype, seed):
    if seed is not None and dtype.itemsize != 2:
        return  # refused: there is nothing to round
    layer = make_layer(*shape, basis, 1, dtype)

    def merged(weight, lam, gam):
        return merged_weight(layer.basis, weight, lam, gam, 1e-3, rounding_seed=seed)

    got, want = on_both(device, merged, layer.weight, layer.lam, layer.gam)
    assert got.dtype == dtype and rms_error(got, want) <= 2 * torch.finfo(dtype).eps
    # The words that round are those of the CPU, so only where the sums differ in their last bits
    # can an element go the other way.
    assert (got != want).double().mean() <= (0.02 if dtype.itemsize == 2 else 1.0)


@pytest.mark.parametrize("dtype", ALL_TYPES, ids=str)
@pytest.mark.parametrize("size", [(8, 4, 32), (3, 5, 7), (1, 1, 1), (1, 9, 1), (40, 1, 17),
                                  (2, 100, 3), (5, 3, 130), (32, 20, 300)], ids=str)  # fmt: skip
def test_scaled_basis(device, size, dtype):
    r, n, d = size
    make = torch.Generator().manual_seed(sum(size))

    def normal(*shape):
        return torch.randn(shape, generator=make, dtype=torch.float64).to(dtype)

    A, lam, gam, grad = normal(r, d), normal(r, n), normal(n, d), normal(r * n, d)
    assert same(*on_both(device, ops.scaled_basis, A, lam, gam))  # two products, one rounding
    got, want = on_both(device, ops.scaled_basis_backward, grad, A, lam, gam)
    bound = FP64 if dtype is torch.float64 else 2 * torch.finfo(dtype).eps
    assert all(rms_error(a, b) <= bound for a, b in zip(got, want, strict=True))


def test_run_to_run_equality(device):
    for basis in (1 / 3, 0.07, "hadamard"):
        layer = make_layer(157, 93, 9, basis, 70, torch.bfloat16)
        for path, b_side in PATHS:
            if (basis, path) == ("hadamard", "delta"):
                continue
            first, second = (run_linear(layer, path, b_side, device) for _ in range(2))
            assert all(same(first[n], second[n]) for n in NAMES), (basis, path)
