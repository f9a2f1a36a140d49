"""Every operator on the card against the CPU kernels and the fp64 oracle, over ragged shapes."""

from itertools import product

import pytest
import torch
from gpu_helpers import (
    ALL_TYPES,
    DENSITIES,
    LOW,
    NAMES,
    PATHS,
    SHAPES,
    assert_as_by_cpu_kernels,
    assert_parity,
    cases,
    cpu_kernels,
    in_turn,
    on_both,
    ops,
    run_linear,
    same,
)
from layer_cases import exact, largest_error, make_layer, plain, rms_error
from randlora_ext.ops.ternary import operands

from randlora_ext import merged_weight

pytestmark = pytest.mark.gpu
FP64 = 1e-12
# in, out, r: r divides d or not; rows of B that repeat; r > d; a row of more than 1,024 numbers
HADAMARD = [(64, 96, 8), (130, 70, 7), (61, 300, 7), (20, 24, 32), (1, 1, 1), (1100, 1300, 32)]


# Wide and tall take turns, so both meet every density, dtype and path.
WIDE_AND_TALL = [(64, 64, 8), (50, 37, 7), (37, 130, 16), (24, 20, 32)]


# ---- linear


@cases("shape, density, way", in_turn(PATHS, SHAPES, DENSITIES))
def test_linear_in_float64(device, shape, density, way):
    for tokens in (0, 1, 5, 17, 33, 130):
        layer = make_layer(*shape, density, tokens)
        assert_as_by_cpu_kernels(layer, *way, device, FP64)
        if way[0] != "merged":
            assert_as_by_cpu_kernels(layer.without_weight(), *way, device, FP64)


@cases(
    "density, dtype, way, shape",
    in_turn(WIDE_AND_TALL, DENSITIES, LOW, PATHS[:3])
    # In 16 bits W + dW rounds what the others keep.
    + in_turn(WIDE_AND_TALL, DENSITIES, [torch.float32], PATHS[3:]),
)
def test_linear_by_the_error_rule(device, shape, density, dtype, way):
    for tokens in (1, 16, 33, 130):
        layer = make_layer(*shape, density, tokens, dtype)
        if way[0] == "merged":  # one GEMM on the sum: one rounding more
            assert_parity(layer, *way, device, floor=2)
        else:
            assert_parity(layer, *way, device)
            assert_parity(layer.without_weight(), *way, device)


# Not merged: W + dW rounds what the others keep.
@cases("dtype, way, shape", in_turn([(64, 48, 8), (48, 64, 8), (256, 192, 16)], LOW[1:], PATHS[:3]))
def test_16_bits_err_less_than_plain_pytorch(device, shape, dtype, way):
    # The rule allows twice its error, and an eps on top. docs/cuda.md has what is seen.
    for density in (1 / 3, 0.07):
        layer = make_layer(*shape, density, 64, dtype)
        got, oracle, simple = run_linear(layer, *way, device), exact(layer), plain(layer)
        for name in NAMES:
            assert rms_error(got[name], oracle[name]) <= rms_error(simple[name], oracle[name]), name


@cases("dtype", LOW[1:])
@cases(
    "shape, basis",
    [
        *((shape, 1 / 3) for shape in WIDE_AND_TALL[:3]),
        *((shape, "hadamard") for shape in HADAMARD[:4]),
        ((50, 37, 7), "dense"),
    ],
)
def test_merged_in_16_bits(device, shape, basis, dtype):
    layer = make_layer(*shape, basis, 33, dtype)
    # The sums of dW differ in their order: an ulp of W + dW may differ.
    bound = 4 * torch.finfo(dtype).eps
    assert_as_by_cpu_kernels(layer, "merged", "packed", device, bound, rms_error)


@cases(
    "shape, basis, dtype, path",
    [
        *product(HADAMARD, ["hadamard"], ALL_TYPES, ["factored"]),
        *((*case, "merged") for case in in_turn(ALL_TYPES, HADAMARD, ["hadamard"])),
        *in_turn(["factored", "delta", "merged"], SHAPES, ["dense"], ALL_TYPES),
    ],
)
def test_hadamard_and_dense_bases(device, shape, basis, dtype, path):
    for tokens in (0, 1, 5, 16, 130):
        layer = make_layer(*shape, basis, tokens, dtype)
        if dtype is torch.float64:
            assert_as_by_cpu_kernels(layer, path, "packed", device, FP64)
        elif tokens and (path != "merged" or dtype is torch.float32):
            if basis == "hadamard":
                assert_parity(layer, path, "packed", device, 2 if path == "merged" else 1)
            elif min(shape) > 1:
                assert_parity(layer, path, "packed", device, 2)


@cases("b_side", ["packed", "dense"])
@cases("density", [1 / 3, 0.07])
def test_no_element_is_wrong_in_a_larger_layer(device, density, b_side):
    # A wrong tile among many would hide in a norm. Float32: the largest difference of all.
    for shape in ((300, 520, 24), (520, 300, 24)):
        layer = make_layer(*shape, density, 150, torch.float32)
        assert_as_by_cpu_kernels(layer, "factored", b_side, device, 2e-5)


@pytest.mark.slow
def test_linear_with_32_bit_positions(device):
    for shape, density in (((65537, 2, 2), 0.12), ((2, 65540, 2), 1 / 3)):
        layer = make_layer(*shape, density, 2)
        want = assert_as_by_cpu_kernels(layer, "factored", "packed", device, FP64)
        assert want["dlam"].any()  # neither A nor B is without elements
        assert density == 1 / 3 or layer.basis.packed(device)[1].dtype == torch.int32


# ---- delta_weight, merged_weight, scaled_basis


LARGER = [(300, 520, 24), (520, 300, 24)]


# Bit planes and lists of each shape.
@cases(
    "shape, density",
    in_turn(DENSITIES, SHAPES + LARGER) + in_turn(DENSITIES[::-1], SHAPES + LARGER),
)
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


# A seed rounds stochastically, which float32 and float64 refuse.
ROUNDED = [*((dtype, None) for dtype in ALL_TYPES), (torch.bfloat16, 7), (torch.float16, 7)]


@cases(
    "basis, rounded, shape",
    in_turn([(50, 37, 7), (37, 50, 7), (72, 136, 8)], [1 / 3, 0.07, "hadamard"], ROUNDED),
)
def test_merged_weight(device, shape, basis, rounded):
    dtype, seed = rounded
    layer = make_layer(*shape, basis, 1, dtype)

    def merged(weight, lam, gam):
        return merged_weight(layer.basis, weight, lam, gam, 1e-3, rounding_seed=seed)

    got, want = on_both(device, merged, layer.weight, layer.lam, layer.gam)
    assert got.dtype == dtype and rms_error(got, want) <= 2 * torch.finfo(dtype).eps
    # The words that round are those of the CPU, so only where the sums differ in their last bits
    # can an element go the other way.
    assert (got != want).double().mean() <= (0.02 if dtype.itemsize == 2 else 1.0)


SIZES = [(8, 4, 32), (3, 5, 7), (1, 1, 1), (1, 9, 1), (40, 1, 17), (2, 100, 3), (5, 3, 130),
         (32, 20, 300)]  # fmt: skip


@cases("dtype", ALL_TYPES)
@cases("size", SIZES)
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
