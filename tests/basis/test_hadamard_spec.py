"""Specification hadamard-1: vectors, NumPy reference and Basis agree."""

import numpy as np
import pytest
import torch
from basis_reference import hadamard, signs
from basis_vectors import HADAMARD_FILE, planes_digest, read_vectors, to_planes, to_signs

from randlora_ext import _C, Basis
from randlora_ext.basis.description import as_signed
from randlora_ext.basis.hadamard import signs as compiled_signs

VECTORS = read_vectors(HADAMARD_FILE)
CPU = torch.device("cpu")


def compiled(in_features, out_features, r, seed):
    basis = Basis(in_features, out_features, r, seed=seed, kind="hadamard")
    return [matrix.to(torch.int8).numpy() for matrix in basis.dense(dtype=torch.float64)]


@pytest.fixture(params=[hadamard, compiled], ids=["reference", "compiled"])
def source(request):
    return request.param


def test_sign_vectors():
    t = _C.threshold(1.0)
    for record in VECTORS["signs"]:
        seed, role, first, count = map(int, record[:4])
        assert to_signs(signs(seed, role, first, count)) == record[4]
        planes = torch.empty((2, 1, -(-count // 64)), dtype=torch.int64)
        torch.ops.randlora.fill_planes_(planes, as_signed(seed), role, 0, first, count, t)
        drawn = torch.ops.randlora.planes_to_dense(planes, count, 1.0, torch.float32)[0]
        assert to_signs(drawn.to(torch.int8).numpy()) == record[4]
        if first < 2**31:
            drawn = compiled_signs(seed, role, first + count, CPU)[first:]
            assert to_signs(drawn.to(torch.int8).numpy()) == record[4]
        single = [_C.element(seed, role, 0, e, t) for e in range(first, first + count)]
        assert to_signs(np.array(single)) == record[4]


def test_matrix_vectors(source):
    for *layer, name, digest in VECTORS["matrix_planes"]:
        matrix = source(*map(int, layer))["AB".index(name)]
        assert planes_digest(to_planes(matrix)) == digest, (layer, name)
    for *layer, name, row, expected in VECTORS["matrix_row"]:
        assert to_signs(source(*map(int, layer))["AB".index(name)][int(row)]) == expected


def test_the_packed_form_holds_the_signs_and_nothing_else():
    basis = Basis(61, 130, 7, seed=2**64 - 1, kind="hadamard")
    for role, (packed, count) in enumerate(zip(basis.packed(), (61, 130, 63), strict=True), 3):
        assert packed.shape == (count,)
        assert np.array_equal(packed.numpy(), signs(2**64 - 1, role, 0, count))
    assert (basis.kind, basis.format, basis.density, basis.scale) == ("hadamard",) * 2 + (1.0, 1.0)
    with pytest.raises(ValueError, match="density must be None for Hadamard.*0.5"):
        Basis(5, 7, 3, 0.5, kind="hadamard")


def test_layers_of_all_sizes_share_the_signs(source):
    _, B = source(300, 420, 30, 6)
    for layer in ((61, 130, 7), (130, 300, 31), (9, 8, 20), (1, 1, 1)):
        a, b = source(*layer, 6)
        assert np.array_equal(b, B[: b.shape[0], : b.shape[1]])
        assert np.array_equal(a[0], signs(6, 3, 0, min(layer[:2])))  # row 0 of H is all +1
    assert not np.array_equal(source(300, 420, 30, 7)[1], B)
    assert all(map(np.array_equal, source(64, 96, 16, 9), source(96, 64, 16, 9)))
