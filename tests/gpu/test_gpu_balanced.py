"""Balanced bases on the card: generated bit for bit as by the CPU kernels, products as by both."""

import pytest
import torch
from gpu_helpers import (
    NAMES,
    PATHS,
    assert_parity,
    cpu_kernels,
    moved,
    on_both,
    ops,
    run_linear,
    run_linear_by_cpu_kernels,
    same,
)
from layer_cases import largest_error, make_layer

from randlora_ext import TernaryBasis

pytestmark = pytest.mark.gpu
FP64 = 1e-12
# in, out, r, q: as gpu_helpers.SHAPES; q of 1, of r and between.
SHAPES = [
    (64, 64, 8, 2), (50, 37, 7, 3), (37, 50, 7, 1), (20, 24, 32, 4), (101, 67, 1, 1), (1, 1, 1, 1),
    (33, 130, 16, 16), (136, 72, 8, 1), (72, 136, 8, 3),
]  # fmt: skip


def basis_of(shape) -> TernaryBasis:
    *sizes, r, q = shape
    return TernaryBasis(*sizes, r, q / r, seed=2**64 - 1, support="balanced")


@pytest.mark.parametrize("shape", [*SHAPES, (300, 520, 24, 5), (3, 700, 2, 1)], ids=str)
def test_packed_forms(device, shape):
    basis, on_cpu = basis_of(shape), basis_of(shape)
    with cpu_kernels():
        want = on_cpu._pack(torch.device("cpu"))  # not shared with what the card makes
        dense = on_cpu.dense()
    got = basis._pack(device)
    assert all(t.device == device for t in got) and same(moved(got, "cpu"), want)
    assert same(moved(basis.dense(device), "cpu"), dense)
    assert same(basis._dense_b(device, torch.float32).cpu(), dense[1].sign())


@pytest.mark.parametrize("line", [0, 1, 2**31, 2**32 - 70])
@pytest.mark.parametrize("n", [1, 32, 200])
def test_lines_anywhere_in_the_infinite_matrix(device, line, n):
    q, lines = 3, 70

    def fill(like):
        offset = torch.full((11 + 1,), -1, device=like.device)
        row = torch.full((lines * q,), -1, dtype=torch.int32, device=like.device)
        sign = torch.full((lines * q, -(-n // 32)), -1, dtype=torch.int32, device=like.device)
        ops.fill_balanced_(offset, row, sign, -5, 1, line, q, n)
        return [offset, row, sign, ops.balanced_to_planes(offset, row, sign, lines, n)]

    assert same(*on_both(device, fill, torch.empty(0)))


@pytest.mark.parametrize("path, b_side", PATHS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_in_float64(device, shape, path, b_side):
    *sizes, r, q = shape
    for tokens in (0, 1, 17, 130):
        whole = make_layer(*sizes, r, q / r, tokens, support="balanced")
        for layer in (whole, whole.without_weight()):
            if layer.weight is None and path == "merged":
                continue
            want = run_linear_by_cpu_kernels(layer, path)
            got = run_linear(layer, path, b_side, device)
            for name in NAMES:
                assert largest_error(got[name], want[name]) <= FP64, (name, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(2100, 2300), (2300, 2100)], ids=str)
def test_large_tiles_and_parts(card, sizes, dtype):
    """Sizes at which a card with any number of multiprocessors takes the large tiles."""
    layer = make_layer(*sizes, 32, 1 / 8, 2100, dtype, support="balanced")
    assert_parity(run_linear(layer, "factored", "packed", card), layer, "factored")


@pytest.mark.parametrize("path, b_side", PATHS[:3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 8, 1), (50, 37, 7, 3), (37, 130, 16, 4)], ids=str)
def test_linear_by_the_error_rule(device, shape, dtype, path, b_side):
    *sizes, r, q = shape
    for tokens in (1, 16, 130):
        layer = make_layer(*sizes, r, q / r, tokens, dtype, support="balanced")
        assert_parity(run_linear(layer, path, b_side, device), layer, path)
