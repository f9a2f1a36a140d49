"""The packed tensors of a basis: equal to the dense matrices, shared, and freed in time."""

import weakref

import numpy as np
import pytest
import torch
from basis_vectors import to_lists, to_planes
from layer_cases import exact, imported_basis, largest_error, make_basis, make_layer, ours

from randlora_ext import Basis, linear
from randlora_ext.basis.cache import _cache
from randlora_ext.basis.ternary import PLANES_ABOVE_DENSITY
from randlora_ext.devices import has_cuda_kernels

ops = torch.ops.randlora
SHAPES = [(50, 37, 7), (37, 50, 7), (20, 24, 32), (1, 1, 1), (130, 200, 1), (3, 700, 2)]


@pytest.mark.parametrize("density", [1.0, 1 / 3, 0.07, 1 / 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_equals_dense(shape, density):
    generated = Basis(*shape, density, seed=8)
    for basis in (generated, imported_basis(*generated.dense(), *shape[:2])):
        A, B = (m.sign().to(torch.int8).numpy() for m in basis.dense(dtype=torch.float64))
        packed = basis.packed("cpu")
        assert packed is basis.packed() is basis.packed(torch.device("cpu"))
        of_b = [to_planes(B)]
        if basis.format == "lists":
            of_b = [*to_lists(B, False), *to_lists(B, True)]
        tables = packed[2]
        assert tables.dtype == torch.int32
        assert bool(tables.numel()) == has_cuda_kernels(torch.device("cpu"))
        wanted = *to_lists(A, False), *of_b
        for found, want in zip(packed[:2] + packed[3:], wanted, strict=True):
            assert found.dtype in (torch.int64, torch.int16)
            found = found.numpy().view(np.uint16) if found.itemsize == 2 else found.numpy()
            assert np.array_equal(found, want)


def test_format_threshold():
    above = np.nextafter(PLANES_ABOVE_DENSITY, 1)
    for density, non_zeros, form in (
        (PLANES_ABOVE_DENSITY, 50 * 42 // 8, "lists"),
        (above, 50 * 42 // 8 + 1, "planes"),
    ):
        assert Basis(50, 37, 7, density).format == form
        B = torch.zeros(50, 42)
        B.view(-1)[:non_zeros] = 1
        assert imported_basis(torch.ones(7, 37), B, 50, 37).format == form


# in, out, r: the longest lines that lists hold, and one more of x, y or K.
@pytest.mark.parametrize(
    "shape, form",
    [
        ((65536, 2, 1), "lists"),
        ((65537, 2, 1), "planes"),
        ((3, 65537, 2), "planes"),
        ((65535, 65535, 65534), "planes"),  # K is 131,068
    ],
    ids=str,
)
def test_the_format_of_long_lines(shape, form):
    basis = Basis(*shape, 0.05)
    assert basis.format == form
    if basis.d > 3:
        return
    layer = make_layer(*shape, 0.05, 3)
    oracle = exact(layer)
    for name, value in ours(layer).items():
        assert largest_error(value, oracle[name]) <= 1e-12, name
    if form == "lists":  # the last rows are really used
        assert layer.basis.packed("cpu").b_col_index.numpy().view(np.uint16).max() > 65000


def test_bases_whose_lists_would_be_too_long_are_refused():
    for kind in (1 / 3, 0.05):
        with pytest.raises(ValueError, match="in_features or out_features must be at most 65536"):
            Basis(65537, 65538, 8, kind)
    assert Basis(65537, 65538, 8).format == "hadamard"


# ---- one copy for all who share a description


def pointers(basis):
    return [t.data_ptr() for t in basis.packed("cpu") if t.numel()]  # a_tables has none


@pytest.mark.parametrize("density", [1 / 3, 0.07])
def test_equal_bases_share_one_copy_which_dies_with_the_last(density):
    before = set(_cache.keys())
    first, second = (Basis(500, 370, 7, density, seed=77) for _ in range(2))
    watched = [weakref.ref(t) for t in first.packed("cpu")]
    assert pointers(first) == pointers(second)
    assert len(set(_cache.keys()) - before) == 1
    other = Basis(500, 370, 7, density, seed=78)
    assert set(pointers(other)).isdisjoint(pointers(first))
    del first, other
    third = Basis(500, 370, 7, density, seed=77)
    assert third.packed("cpu")[0] is watched[0]()
    del second, third
    assert all(ref() is None for ref in watched) and set(_cache.keys()) <= before


def test_a_graph_keeps_its_packed_tensors_and_no_longer():
    basis = Basis(50, 37, 7, 0.07, seed=79)
    lam, gam = torch.randn(7, 6).requires_grad_(), torch.randn(6, 37)
    y = linear(torch.randn(4, 50), None, None, basis, lam, gam)
    watched = weakref.ref(basis.packed("cpu")[2])
    del basis
    y.sum().backward()  # still right after the basis itself is gone
    assert lam.grad.isfinite().all()
    del y
    assert watched() is None


@pytest.mark.parametrize("kind", [0.07, "hadamard"])
def test_packed_in_inference_mode_serves_training_later(kind):
    basis = make_basis(50, 37, 7, kind, seed=81)  # packed anew: the one before is gone
    lam, gam, x = torch.randn(7, 6), torch.randn(6, 37), torch.randn(4, 50)
    with torch.inference_mode():
        y = linear(x, None, None, basis, lam, gam)
    assert not any(t.is_inference() for t in basis.packed("cpu"))
    again = linear(x, None, None, basis, lam.requires_grad_(), gam)
    assert torch.equal(again.detach(), y)
    again.sum().backward()
    assert lam.grad is not None


def test_zeros_of_either_sign_are_zeros():
    planes, value = ops.pack_dense(torch.tensor([[0.0, -0.0, 2.0, -2.0]]))
    assert value.item() == 2.0 and planes[:, 0, 0].tolist() == [0b0100, 0b1000]
    assert ops.planes_to_dense(planes, 4, 2.0, torch.float32).signbit().tolist() == [[0, 0, 0, 1]]
