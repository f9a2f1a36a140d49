"""Specification block-1: vectors, NumPy reference and TernaryBasis agree; dW has full rank."""

import math

import numpy as np
import pytest
import torch
from basis_reference import block
from basis_vectors import BLOCK_FILE, planes_digest, read_vectors, to_planes, to_signs
from make_basis_vectors import BLOCKS, render

from randlora_ext import _C, TernaryBasis
from randlora_ext.reference import scaled_basis_reference

VECTORS = read_vectors(BLOCK_FILE)


def compiled(in_features, out_features, r, groups, seed):
    """A and B of TernaryBasis as int8; their scale is asserted."""
    basis = TernaryBasis(in_features, out_features, r, 1 / groups, seed, kind="block")
    matrices = basis.dense(dtype=torch.float64)
    for scaled in matrices:
        torch.testing.assert_close(scaled, scaled.sign() * math.sqrt(groups))
    return [scaled.sign().to(torch.int8).numpy() for scaled in matrices]


@pytest.fixture(params=[block, compiled], ids=["reference", "compiled"])
def source(request):
    return request.param


def test_vector_file_regenerates_byte_for_byte():
    assert BLOCK_FILE.read_bytes() == render(BLOCK_FILE).encode("ascii")
    assert sorted(VECTORS) == ["block_planes", "block_row"]


@pytest.mark.parametrize("record", VECTORS["block_planes"], ids=lambda r: " ".join(r[:6]))
def test_matrix_vectors(record, source):
    *layer, role, digest = record
    assert planes_digest(to_planes(source(*map(int, layer))[int(role)])) == digest


def test_row_vectors(source):
    for *layer, role, row, signs in VECTORS["block_row"]:
        assert to_signs(source(*map(int, layer))[int(role)][int(row)]) == signs


@pytest.mark.parametrize("layer", [*BLOCKS[:4], *BLOCKS[5:]], ids=str)
def test_elements_are_the_formulas_of_the_page(layer):
    # The page's formulas on Python integers, of compiled elements of version 1.
    in_features, out_features, r, G, seed = layer
    d, D = min(in_features, out_features), max(in_features, out_features)
    n, q, one = math.ceil(d / r), r // G, _C.threshold(1.0)

    def a(j, k):
        inside, column_class = j // q == k // (d // G), (k % (d // G)) // n
        hadamard = (-1) ** bin((j % q) & column_class).count("1")
        return _C.element(seed, 0, 0, k, one) * hadamard if inside else 0

    def b(o, c):
        return _C.element(seed, 1, o, c, one) if o // (D // G) == c % G else 0

    A, B = block(*layer)
    assert A.tolist() == [[a(j, k) for k in range(d)] for j in range(r)]
    assert B.tolist() == [[b(o, c) for c in range(r * n)] for o in range(D)]


def test_swapped_features_have_the_same_matrices(source):
    (A, B), (other_a, other_b) = source(64, 96, 16, 4, 9), source(96, 64, 16, 4, 9)
    assert np.array_equal(A, other_a) and np.array_equal(B, other_b)


# ---- dW: its zeros and its rank


def delta(d, D, r, groups, seed):
    """A, B and dW (D, d) in fp64 of random lambda and gamma."""
    A, B = (torch.from_numpy(matrix).double() for matrix in block(d, D, r, groups, seed))
    n, generator = -(-d // r), torch.Generator().manual_seed(seed)
    lam, gam = (torch.randn(s, generator=generator, dtype=A.dtype) for s in ((r, n), (n, d)))
    return A, B, B @ scaled_basis_reference(A, lam, gam)


def groups_of_rank(r):
    """Every number of groups from 2 to r of which the rank allows a basis."""
    return [G for G in range(2, r + 1) if r % G == 0 and (r // G).bit_count() == 1]


# d, D, r, groups: square blocks of B are 32 x 32 or larger, so that none is singular by chance.
FULL_RANK = [
    *((512, 512, 32, G) for G in groups_of_rank(32) if G < 32),
    *((1024, 1024, 32, G) for G in groups_of_rank(32)),
    *((512, 1024, 32, G) for G in groups_of_rank(32)),
    *((360, 720, 48, G) for G in groups_of_rank(48) if 360 % G == 0),  # r does not divide d
]


@pytest.mark.parametrize("d, D, r, G", FULL_RANK)
def test_delta_weight_has_full_rank(d, D, r, G, one_thread):
    dW = delta(d, D, r, G, 1)[2]
    assert torch.linalg.matrix_rank(dW).item() == d
    assert bool((dW != 0).all()) == (r * -(-d // r) >= G**2)


@pytest.mark.parametrize(
    "d, D, r, G",
    [(512, 512, 32, 32), (512, 512, 32, 16), (64, 96, 16, 8), (40, 48, 8, 8), (360, 720, 48, 12)],
)
def test_every_element_of_delta_weight_has_its_terms(d, D, r, G):
    # K / G^2, rounded down or up; below G^2 columns of B some elements have none.
    A, B, dW = delta(d, D, r, G, 0)
    n = -(-d // r)
    terms = B.abs() @ A.abs().repeat_interleave(n, dim=0)
    low = r * n // G**2
    assert terms.min() == low and terms.max() == -(-r * n // G**2)
    assert torch.equal(terms == 0, dW == 0)
