"""`scaled_basis` is two multiplications an element: equal to the reference to the last bit."""

import pytest
import torch
from layer_cases import SIXTEEN_BITS, largest_error, make_basis, one_thread  # noqa: F401

from randlora_ext import scaled_basis
from randlora_ext.reference import scaled_basis_reference

ALL_TYPES = [torch.float64, torch.float32, *SIXTEEN_BITS]
# r, n, d: about the vector lengths (4 to 16 lanes), odd, n > d, r > d, one of each.
SIZES = [(8, 4, 32), (3, 5, 7), (1, 1, 1), (1, 9, 1), (40, 1, 17), (2, 100, 3), (5, 3, 130)]


def normal(*shape, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=make, dtype=torch.float64).to(dtype)


def dense_bases(r, d, dtype):
    """A of any kind: PEFT's default is uniform, its sparse ones are ternary."""
    yield "normal", normal(r, d, dtype=dtype)
    yield "uniform", torch.rand(r, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    yield "ternary", normal(r, d).sign().mul((normal(r, d, seed=1) > 0) * 3**0.5).to(dtype)
    yield "zero", torch.zeros(r, d, dtype=dtype)
    yield "transposed", normal(d, r, dtype=dtype).T
    yield "strided", normal(2 * r, 3 * d, dtype=dtype)[::2, ::3]
    yield "one row", normal(1, d, dtype=dtype).expand(r, d)


def run(function, A, lam, gam, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (lam, gam)]
    out = function(A, *leaves)
    gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return dict(zip(("out", "dlam", "dgam"), (out.detach(), *gradients), strict=True))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64(size):
    r, n, d = size
    lam, gam, grad = normal(r, n), normal(n, d), normal(r * n, d)
    for kind, A in dense_bases(r, d, torch.float64):
        results = run(scaled_basis, A, lam, gam, grad)
        oracle = run(scaled_basis_reference, A, lam, gam, grad)
        assert torch.equal(results["out"], oracle["out"]), kind
        assert results["out"].is_contiguous() and results["out"].shape == (r * n, d)
        for name in ("dlam", "dgam"):
            assert largest_error(results[name], oracle[name]) <= 1e-13, (kind, name)


@pytest.mark.parametrize("dtype", ALL_TYPES[1:], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_multiplies_in_float32_and_rounds_once(size, dtype):
    r, n, d = size
    lam, gam = normal(r, n, dtype=torch.float32), normal(n, d, dtype=torch.float32)
    for kind, A in dense_bases(r, d, dtype):
        out = scaled_basis(A, lam, gam)
        assert out.dtype == dtype
        wide = scaled_basis_reference(A.float(), lam, gam)
        assert torch.equal(out, wide.to(dtype)), kind


@pytest.mark.parametrize("a_type", ALL_TYPES, ids=str)
@pytest.mark.parametrize("diagonal_type", ALL_TYPES, ids=str)
def test_gradients_have_the_types_of_the_diagonals(a_type, diagonal_type):
    A, lam, gam = normal(5, 33, dtype=a_type), normal(5, 7), normal(7, 33)
    lam, gam = lam.to(diagonal_type), gam.to(diagonal_type)
    results = run(scaled_basis, A, lam, gam, normal(35, 33))
    assert results["out"].dtype == a_type
    assert results["dlam"].dtype == results["dgam"].dtype == diagonal_type
    grad = normal(35, 33).to(a_type).double()
    oracle = run(scaled_basis_reference, A.double(), lam.double(), gam.double(), grad)
    coarsest = max(a_type, diagonal_type, key=lambda t: torch.finfo(t).eps)
    bound = 4 * torch.finfo(coarsest).eps
    assert all(largest_error(results[name], oracle[name]) <= bound for name in results)


def test_a_dense_basis_gets_no_gradient():
    A = normal(5, 33).requires_grad_()
    lam, gam = normal(5, 7).requires_grad_(), normal(7, 33)
    scaled_basis(A, lam, gam).sum().backward()  # an expanded scalar
    assert A.grad is None and gam.grad is None
    assert torch.equal(lam.grad, run(scaled_basis, A, lam, gam, torch.ones(35, 33))["dlam"])


@pytest.mark.parametrize("kind", [1.0, 0.07, "hadamard", "dense"])
def test_of_a_basis(kind):
    basis = make_basis(50, 37, 7, kind)
    for dtype in ALL_TYPES:
        lam, gam = normal(basis.r, basis.n, dtype=dtype), normal(basis.n, basis.d, dtype=dtype)
        out = scaled_basis(basis, lam, gam)
        assert out.dtype == dtype and out.shape == (basis.K, basis.d)
        assert torch.equal(out, scaled_basis(basis.dense(dtype=dtype)[0], lam, gam))
