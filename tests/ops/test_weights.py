"""`delta_weight`, `scaled_basis`, `hadamard_weight`, and the matrices of a dense basis."""

import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from layer_cases import (
    BASES,
    CALLS,
    SCALED,
    SHAPES,
    SIXTEEN_BITS,
    basis_arguments,
    delta_by_reference,
    largest_error,
    make_layer,
)

from randlora_ext import Basis, delta_weight
from randlora_ext.ops import dense, hadamard
from randlora_ext.reference import scaled_basis_reference

ops = torch.ops.randlora
ALL_TYPES = [torch.float64, torch.float32, *SIXTEEN_BITS]
SCALING = 0.75
FP64 = 1e-12  # relative; about 1e-13 is seen


def normal(*shape, dtype=torch.float64):
    make = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=make, dtype=torch.float64).to(dtype)


def run(function, lam, gam, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (lam, gam)]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return dict(zip(("out", "dlam", "dgam"), (out.detach(), *gradients), strict=True))


# ---- delta_weight


@pytest.mark.parametrize("kind", [*BASES, SCALED, 0.12, 0.13])
@pytest.mark.parametrize("shape", [*SHAPES, (530, 640, 16), (1000, 129, 2)], ids=str)
def test_delta_weight_in_float64(shape, kind):
    layer = make_layer(*shape, kind, 1)
    lam, gam = (t.mT.contiguous().mT for t in (layer.lam, layer.gam))
    rest = lam, gam, normal(*shape[:2]).T
    options = {"scaling": SCALING, "input_scale": layer.input_scale}
    oracle = run(partial(delta_by_reference, layer.basis, **options), *rest)
    results = run(partial(delta_weight, layer.basis, **options), *rest)
    for name, value in results.items():
        assert value.dtype == torch.float64 and value.shape == oracle[name].shape
        assert largest_error(value, oracle[name]) <= FP64, name


@CALLS
def test_16_bit_results_are_rounded_once(basis):
    low, wide = SIXTEEN_BITS, torch.float32
    for lam_type, gam_type in (*zip(low, low, strict=True), (torch.bfloat16, wide)):
        layer = make_layer(50, 37, 7, basis, 1)
        lam, gam = layer.lam.to(lam_type), layer.gam.to(gam_type)
        results = run(partial(delta_weight, layer.basis), lam, gam, layer.weight)
        assert [t.dtype for t in results.values()] == [lam_type, lam_type, gam_type]
        rounded = delta_weight(layer.basis, lam.float(), gam.float()).to(lam_type)
        assert torch.equal(results["out"], rounded)


# ---- scaled_basis: two multiplications an element, equal to the reference to the last bit

# r, n, d: about the vector lengths (4 to 16 lanes), odd, n > d, r > d, one of each.
SIZES = [(8, 4, 32), (3, 5, 7), (1, 1, 1), (1, 9, 1), (40, 1, 17), (2, 100, 3), (5, 3, 130)]


@pytest.mark.parametrize("dtype", ALL_TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scaled_basis_multiplies_in_32_or_64_bits_and_rounds_once(size, dtype):
    r, n, d = size
    wide = torch.promote_types(dtype, torch.float32)
    lam, gam = normal(r, n, dtype=wide), normal(n, d, dtype=wide)
    for layout, A in {
        "contiguous": normal(r, d, dtype=dtype),
        "transposed": normal(d, r, dtype=dtype).T,
        "strided": normal(2 * r, 3 * d, dtype=dtype)[::2, ::3],
        "one row": normal(1, d, dtype=dtype).expand(r, d),
    }.items():
        out = ops.scaled_basis(A, lam, gam)
        assert out.dtype == dtype and out.is_contiguous() and out.shape == (r * n, d)
        assert torch.equal(out, scaled_basis_reference(A.to(wide), lam, gam).to(dtype)), layout


@pytest.mark.parametrize("a_type", ALL_TYPES, ids=str)
@pytest.mark.parametrize("diagonal_type", ALL_TYPES, ids=str)
def test_gradients_have_the_types_of_the_diagonals(a_type, diagonal_type):
    A = normal(5, 33, dtype=a_type)
    lam, gam = normal(5, 7, dtype=diagonal_type), normal(7, 33, dtype=diagonal_type)
    bound = 4 * max(torch.finfo(t).eps for t in (a_type, diagonal_type))
    for grad in (normal(35, 33), normal(1, 1).expand(35, 33)):
        results = run(partial(dense.scaled, A), lam, gam, grad)
        assert results["out"].dtype == a_type
        assert results["dlam"].dtype == results["dgam"].dtype == diagonal_type
        wide = lam.double(), gam.double(), grad.to(a_type).double()
        oracle = run(partial(scaled_basis_reference, A.double()), *wide)
        assert all(largest_error(results[name], oracle[name]) <= bound for name in results)


# ---- hadamard_weight: W + dW rounded once

ON_HADAMARD = pytest.mark.parametrize("kind", ["hadamard", SCALED])


def merged(layer):
    """By the kernel and in plain torch, and the oracle in float64."""
    weight, lam, gam = layer.weight, layer.lam, layer.gam
    bases = basis_arguments(replace(layer, scaling=0.5))
    ways = ops.hadamard_weight, hadamard._plain_weight
    results = [way(weight, lam, gam, *bases) for way in ways]
    wide = lam.double(), gam.double()
    delta = delta_by_reference(layer.basis, *wide, scaling=0.5, input_scale=layer.input_scale)
    for got in results:
        assert got.dtype == weight.dtype and got.shape == weight.shape
    return results, weight.double() + delta


@ON_HADAMARD
@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 40, 8), (33, 70, 8), (70, 33, 7), (20, 30, 32)])
@pytest.mark.parametrize("dtype", ALL_TYPES, ids=str)
def test_the_sum_of_weight_and_update(shape, kind, dtype):
    layer = make_layer(*shape, kind, 1, dtype)
    if shape[0] > shape[1]:
        layer = replace(layer, weight=layer.weight.mT.contiguous().mT)
    results, want = merged(layer)
    eps = torch.finfo(dtype).eps
    if dtype.itemsize > 2:
        assert all((got.double() - want).norm() < 4 * eps * want.norm() for got in results)
        return
    bound = eps * want.abs() / 2 + 1e-5 * want.abs().max()
    assert all(bool(((got.double() - want).abs() <= bound).all()) for got in results)


def integers(*shape, largest=8):
    make = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-largest, largest + 1, shape, generator=make)


@ON_HADAMARD
@pytest.mark.parametrize("shape", [(33, 70, 8), (70, 33, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_sum_is_rounded_once(shape, kind, dtype):
    """The update is exact here, of small integers and powers of two, so only the sum rounds."""
    layer = make_layer(*shape, kind, 1, dtype)
    lam, gam = (integers(*t.shape).to(dtype) / 8 for t in (layer.lam, layer.gam))
    input_scale = None if kind != SCALED else 2.0 ** integers(shape[0], largest=2)
    results, want = merged(replace(layer, lam=lam, gam=gam, input_scale=input_scale))
    assert all(torch.equal(got, want.to(dtype)) for got in results)


# ---- dense bases, PEFT's default


def test_bases_are_views_of_the_matrices_and_one_copy_in_another_dtype():
    A, B = torch.rand(4, 40), torch.rand(60, 40)
    one, other = (Basis.from_dense(A, B, *sizes) for sizes in ((40, 60), (50, 20)))
    for basis in (one, other):
        a, b = basis.packed()
        assert (a.shape, b.shape) == ((4, basis.d), (basis.D, basis.K))
        assert a.data_ptr() == A.data_ptr() and b.data_ptr() == B.data_ptr()
        assert basis.packed("cpu", torch.float32)[1].data_ptr() == B.data_ptr()
    assert one.packed("cpu", torch.bfloat16)[1] is one.packed("cpu", torch.bfloat16)[1]
    drawn = one.dense()
    assert torch.equal(drawn[0], A) and drawn[0].data_ptr() != A.data_ptr()
    assert (one.kind, one.format, one.description, one.seed) == ("dense", "dense", None, None)
    assert "dense" in repr(one)
    assert torch.equal(pickle.loads(pickle.dumps(one)).packed()[1], B)
    with pytest.raises(ValueError, match=r"A must be .*\(4, >= 41\) and B .*\(60, 40\)"):
        Basis.from_dense(A, B, 41, 60)
