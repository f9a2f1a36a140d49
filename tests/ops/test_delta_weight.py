"""`delta_weight` against the plain PyTorch reference: float64 exactly, others by the error rule."""

import functools

import pytest
import torch
from layer_cases import (  # noqa: F401
    BASES,
    SHAPES,
    SIXTEEN_BITS,
    assert_rule,
    largest_error,
    make_layer,
    one_thread,
)

from randlora_ext import delta_weight
from randlora_ext.ops.ternary import operands
from randlora_ext.reference import delta_weight_reference

SCALING = 0.75
FP64 = 1e-12  # relative; about 1e-13 is seen


def gradient_of(basis, dtype=torch.float64):
    make = torch.Generator().manual_seed(basis.D + basis.d)
    shape = basis.out_features, basis.in_features
    return torch.randn(shape, generator=make, dtype=torch.float64).to(dtype)


def run(function, lam, gam, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (lam, gam)]
    dW = function(*leaves)
    gradients = torch.autograd.grad(dW, leaves, grad.to(dW.dtype))
    return dict(zip(("dW", "dlam", "dgam"), (dW.detach(), *gradients), strict=True))


def ours(basis, lam, gam, grad):
    return run(lambda lam_, gam_: delta_weight(basis, lam_, gam_, SCALING), lam, gam, grad)


def plain(basis, lam, gam, grad, dtype):
    A, B = basis.dense(dtype=dtype)
    last = SCALING, basis.out_features, basis.in_features
    function = functools.partial(delta_weight_reference, A, B)
    return run(lambda *d: function(*d, *last), lam.to(dtype), gam.to(dtype), grad)


def diagonals(shape, kind, dtype=torch.float64):
    layer = make_layer(*shape, kind, 1)
    return layer.basis, layer.lam.to(dtype), layer.gam.to(dtype)


@pytest.mark.parametrize("kind", [*BASES, 0.12, 0.13])
@pytest.mark.parametrize("shape", [*SHAPES, (530, 640, 16), (1000, 129, 2)], ids=str)
def test_float64(shape, kind):
    basis, lam, gam = diagonals(shape, kind)
    grad = gradient_of(basis)
    oracle, results = plain(basis, lam, gam, grad, torch.float64), ours(basis, lam, gam, grad)
    assert results["dW"].shape == (shape[1], shape[0])
    for name, value in results.items():
        assert value.dtype == torch.float64 and value.shape == oracle[name].shape
        assert largest_error(value, oracle[name]) <= FP64, name


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 8), (50, 37, 7), (37, 130, 16), (20, 24, 32)], ids=str)
def test_error_rule(shape, dtype, kind):
    basis, lam, gam = diagonals(shape, kind, dtype)
    grad = gradient_of(basis, dtype)
    results = ours(basis, lam, gam, grad)
    assert {value.dtype for value in results.values()} == {dtype}
    oracle = plain(basis, lam, gam, grad, torch.float64)
    assert_rule(results, plain(basis, lam, gam, grad, dtype), oracle, dtype)


@pytest.mark.parametrize("kind", [1 / 3, 0.07, "hadamard"])
def test_only_what_is_asked_for_gets_a_gradient(kind):
    basis, *leaves = diagonals((50, 37, 7), kind)
    grad = gradient_of(basis)
    expected = ours(basis, *leaves, grad)
    assert not delta_weight(basis, *leaves).requires_grad
    for wanted, name in zip(leaves, ("dlam", "dgam"), strict=True):
        wanted.requires_grad_()
        delta_weight(basis, *leaves, SCALING).backward(grad)
        assert torch.equal(wanted.grad, expected[name])
        wanted.requires_grad_(False).grad = None
        assert all(leaf.grad is None for leaf in leaves)


def test_diagonals_of_two_types_give_the_type_of_lam():
    basis, lam, gam = diagonals((50, 37, 7), 0.07, torch.float32)
    lam = lam.bfloat16()
    results = ours(basis, lam, gam, gradient_of(basis))
    assert results["dW"].dtype == results["dlam"].dtype == torch.bfloat16
    assert results["dgam"].dtype == torch.float32
    assert torch.equal(results["dW"], delta_weight(basis, lam.float(), gam, SCALING).bfloat16())


@pytest.mark.parametrize("kind", [1 / 3, 0.07, "hadamard"])
def test_16_bit_results_are_rounded_once(kind):
    for dtype in SIXTEEN_BITS:
        basis, lam, gam = diagonals((50, 37, 7), kind, dtype)
        wide = delta_weight(basis, lam.float(), gam.float(), SCALING)
        assert torch.equal(delta_weight(basis, lam, gam, SCALING), wide.to(dtype))


@pytest.mark.parametrize("kind", [1 / 3, 0.07])
def test_raw_operators(kind):
    basis, lam, gam = diagonals((50, 37, 7), kind, torch.float32)
    grad, bases = gradient_of(basis, torch.float32), operands(basis, "cpu", SCALING)
    expected = ours(basis, lam, gam, grad)
    dW = torch.ops.randlora.delta_weight(lam, gam, *bases)
    assert torch.equal(dW, expected["dW"])
    dlam, dgam = torch.ops.randlora.delta_weight_backward(grad, lam, gam, *bases)
    assert torch.equal(dlam, expected["dlam"]) and torch.equal(dgam, expected["dgam"])
    # A gradient in 16 bits: contracted in float32, returned in the types of lam and gam.
    low = torch.ops.randlora.delta_weight_backward(grad.bfloat16(), lam, gam, *bases)
    wide = ours(basis, lam, gam, grad.bfloat16().float())
    assert low[0].dtype == low[1].dtype == torch.float32
    assert torch.equal(low[0], wide["dlam"]) and torch.equal(low[1], wide["dgam"])
