"""Bases on the card: generation, packing and expansion, bit for bit those of the CPU kernels."""

import pytest
import torch
from gpu_helpers import (
    ALL_TYPES,
    DENSITIES,
    cases,
    cpu_kernels,
    in_turn,
    moved,
    on_both,
    ops,
    same,
)
from layer_cases import imported_basis

from randlora_ext import TernaryBasis
from randlora_ext.basis.ternary import generate_planes

pytestmark = pytest.mark.gpu
SHAPES = [(64, 64, 8), (50, 37, 7), (37, 50, 7), (20, 24, 32), (1, 1, 1), (130, 200, 1),
          (3, 700, 2), (300, 520, 24)]  # fmt: skip
LIMIT = 2**32  # of rows and columns of the infinite matrices


@cases("density", [*DENSITIES, 1e-3])
@cases("shape", SHAPES)
def test_packed_forms(device, shape, density):
    basis, on_cpu = (TernaryBasis(*shape, density, seed=2**64 - 1) for _ in range(2))
    with cpu_kernels():
        # Not by the cache, which would share what the card makes.
        want = on_cpu._source.pack(on_cpu._shape, torch.device("cpu"))
        dense = on_cpu.dense()
    got = moved(basis._source.pack(basis._shape, device), "cpu")
    tables, none = got.pop(2), want.pop(2)
    assert same(got, want) and tables.dtype == torch.int32 and none.numel() == 0
    assert same(moved(basis.dense(device), "cpu"), dense)
    assert same(basis.dense_a(device, torch.float32).cpu(), dense[0])
    assert all(t.device == device for t in basis.packed(device))


CORNERS = [(0, 0), (1, 1), (7, 63), (65, 128), (2**31, 2**31), (LIMIT - 70, LIMIT - 200)]


@cases("corner, cols, role", in_turn([0, 1], CORNERS, [1, 64, 130, 200]))
def test_any_slice_of_the_infinite_matrix(device, role, corner, cols):
    def planes(where):
        return generate_planes(2**63 + 5, role, corner[0], 70, corner[1], cols, 0.3, where)

    with cpu_kernels():
        want = planes("cpu")
    assert same(planes(device).cpu(), want)


MATRICES = [(1, 1), (3, 64), (64, 3), (65, 127), (200, 1), (1, 200), (130, 700)]


@cases("shape, density", in_turn([0.0, 0.5], MATRICES) + in_turn([1.0, 0.02], MATRICES))
def test_packing_operators(device, shape, density):
    make = torch.Generator().manual_seed(shape[0] + 1000 * shape[1])
    signs = torch.randn(shape, generator=make).sign().double()
    dense = signs * (torch.rand(shape, generator=make) < density)
    planes, _ = ops.pack_dense(dense)
    for dtype in ALL_TYPES:
        assert same(*on_both(device, ops.planes_to_dense, planes, shape[1], 0.1, dtype)), dtype
    for by_column in (False, True):
        length = shape[0] if by_column else shape[1]
        for wide in (False, True):
            got, lists = on_both(device, ops.planes_to_lists, planes, shape[1], by_column, wide)
            assert same(got, lists), (by_column, wide)
            for dtype in ALL_TYPES:
                assert same(*on_both(device, ops.lists_to_dense, *lists, length, 0.1, dtype))


def test_import_from_the_card(device):
    with cpu_kernels():
        A, B = TernaryBasis(50, 37, 7, 0.3).dense(dtype=torch.float64)
    imported = imported_basis(A.to(device), B.to(device), 50, 37)
    assert same(moved(imported.dense(device, torch.float64), "cpu"), (A, B))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(card, room):
    # The dense matrix has 2^31 + 2^16 * 8 elements: every offset needs 64 bits.
    rows, cols = 65536, 32768 + 8
    room(10 << 30)
    planes = generate_planes(1, 1, 0, rows, 0, cols, 0.3, card)
    dense = ops.planes_to_dense(planes, cols, 1.0, torch.bfloat16)
    for first in (0, 65536 - 3):
        with cpu_kernels():
            part = generate_planes(1, 1, first, 3, 0, cols, 0.3)
            want = ops.planes_to_dense(part, cols, 1.0, torch.bfloat16)
        assert same(planes[:, first : first + 3].cpu(), part)
        assert same(dense[first : first + 3].cpu(), want)
