"""Every operator on the card against the CPU kernels and the fp64 oracle, over ragged shapes."""

import pytest
import torch
from gpu_helpers import (
    ALL_TYPES,
    DENSITIES,
    LOW,
    NAMES,
    SHAPES,
    assert_as_by_cpu_kernels,
    assert_parity,
    cases,
    in_turn,
    on_both,
    ops,
    run_linear,
    same,
)
from layer_cases import exact, make_layer, plain, rms_error

from randlora_ext import delta_weight, merged_weight

pytestmark = pytest.mark.gpu
FP64 = 1e-12
# in, out, r: r divides d or not; rows of B that repeat; r > d; a row of more than 1,024 numbers
HADAMARD = [(64, 96, 8), (130, 70, 7), (61, 300, 7), (20, 24, 32), (1, 1, 1), (1100, 1300, 32)]


# Wide and tall take turns, so both meet every density, dtype and path.
WIDE_AND_TALL = [(64, 64, 8), (50, 37, 7), (37, 130, 16), (24, 20, 32)]


# ---- linear


@cases("density", DENSITIES)
@cases("shape", SHAPES)
def test_linear_in_float64(device, shape, density):
    for tokens in (0, 1, 5, 17, 33, 130):
        layer = make_layer(*shape, density, tokens)
        assert_as_by_cpu_kernels(layer, device, FP64)
        assert_as_by_cpu_kernels(layer.without_weight(), device, FP64)


@cases("density, dtype, shape", in_turn(WIDE_AND_TALL, DENSITIES, LOW))
def test_linear_by_the_error_rule(device, shape, density, dtype):
    for tokens in (1, 16, 33, 130):
        layer = make_layer(*shape, density, tokens, dtype)
        assert_parity(layer, device)
        assert_parity(layer.without_weight(), device)


@cases("dtype", LOW[1:])
@cases("shape", [(64, 48, 8), (48, 64, 8), (256, 192, 16)])
def test_16_bits_err_less_than_plain_pytorch(device, shape, dtype):
    # The rule allows twice its error, and an eps on top. docs/cuda.md has what is seen.
    for density in (1 / 3, 0.07):
        layer = make_layer(*shape, density, 64, dtype)
        got, oracle, simple = run_linear(layer, device), exact(layer), plain(layer)
        for name in NAMES:
            assert rms_error(got[name], oracle[name]) <= rms_error(simple[name], oracle[name]), name


@cases("dtype", ALL_TYPES)
@cases(
    "shape, basis",
    [*((s, "hadamard") for s in HADAMARD), *((s, "dense") for s in SHAPES if min(s) > 1)],
)
def test_hadamard_and_dense_bases(device, shape, basis, dtype):
    for tokens in (0, 1, 5, 16, 130, *[260] * (basis == "dense")):  # of 260 dW is formed
        layer = make_layer(*shape, basis, tokens, dtype)
        if dtype is torch.float64:
            assert_as_by_cpu_kernels(layer, device, FP64)
        elif tokens:
            assert_parity(layer, device, 1 if basis == "hadamard" else 2)


@cases("density", [1 / 3, 0.07])
def test_no_element_is_wrong_in_a_larger_layer(device, density):
    # A wrong tile among many would hide in a norm. Float32: the largest difference of all.
    for shape in ((300, 520, 24), (520, 300, 24)):
        layer = make_layer(*shape, density, 150, torch.float32)
        assert_as_by_cpu_kernels(layer, device, 2e-5)


@pytest.mark.slow
def test_linear_with_32_bit_positions(device):
    for shape, density in (((65537, 2, 2), 0.12), ((2, 65540, 2), 1 / 3)):
        layer = make_layer(*shape, density, 2)
        want = assert_as_by_cpu_kernels(layer, device, FP64)
        assert want["dlam"].any()  # neither A nor B is without elements
        assert density == 1 / 3 or layer.basis.packed(device)[1].dtype == torch.int32


# ---- delta_weight, merged_weight, scaled_basis


@cases("dtype", ALL_TYPES)
@cases("basis", [1 / 3, 0.07, "hadamard"])
@cases("shape", [(50, 37, 7), (37, 50, 7), (72, 136, 8)])
def test_delta_weight_and_merged_weight(device, shape, basis, dtype):
    layer = make_layer(*shape, basis, 1, dtype)

    def both(weight, lam, gam):
        return (
            merged_weight(layer.basis, weight, lam, gam, 1e-3),
            delta_weight(layer.basis, lam, gam, 0.75),
        )

    results = on_both(device, both, layer.weight, layer.lam, layer.gam)
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert rms_error(got, want) <= 2 * torch.finfo(got.dtype).eps
    (got, _), (want, _) = results  # only where the sums differ in their last bits
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
        first, second = (run_linear(layer, device) for _ in range(2))
        assert all(same(first[n], second[n]) for n in NAMES), basis
