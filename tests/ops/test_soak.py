"""Three hundred steps of soak.py (ten thousand by hand), and every operator thousands of times."""

import pytest
import soak
import torch

from randlora_ext import TernaryBasis
from randlora_ext.ops.ternary import operands

pytestmark = pytest.mark.usefixtures("one_thread")


def test_memory_does_not_grow():
    torch.manual_seed(0)
    before, after = soak.soak(300)
    # Of the whole process, which other tests have filled: resident memory says nothing here.
    assert soak.grown(before | {"resident": 0}, after | {"resident": 0}) == [], (before, after)


def calls():
    """A call of every operator, by name; the results are dropped."""
    ops = torch.ops.randlora
    basis = TernaryBasis(11, 70, 3, 1 / 3)
    planes = basis.packed("cpu")[3]
    offset, index = ops.planes_to_lists(planes, basis.K, False, False)
    A, B = basis.dense()
    lam, gam = torch.randn(basis.r, basis.n), torch.randn(basis.n, basis.d)
    x, dy, W = torch.randn(2, 11), torch.randn(2, 70), torch.randn(70, 11)
    rest = (lam, gam, *operands(basis, "cpu", 0.5))
    hadamard = TernaryBasis(11, 70, 3, kind="hadamard")
    signs = (lam, gam, *hadamard.packed("cpu"), 0.5, 0, 0, True)
    return {
        "linear": lambda: ops.linear(x, W, None, *rest, "factored", None),
        "linear_backward": lambda: ops.linear_backward(dy, x, W, *rest, "delta", None, True, True),
        "hadamard_linear": lambda: ops.hadamard_linear(x, W, None, *signs, False),
        "hadamard_linear_backward": lambda: ops.hadamard_linear_backward(
            dy, x, W, *signs, False, True, True
        ),
        "hadamard_weight": lambda: ops.hadamard_weight(W.half(), *signs, 7),
        "dense_linear": lambda: ops.dense_linear(x, W, None, lam, gam, A, B, 0.5, True, "factored"),
        "dense_linear_backward": lambda: ops.dense_linear_backward(
            dy, x, W, lam, gam, A, B, 0.5, True, "factored", True, True
        ),
        "add_rounded": lambda: ops.add_rounded(W.half(), W, 7),
        "delta_weight": lambda: ops.delta_weight(*rest),
        "delta_weight_backward": lambda: ops.delta_weight_backward(W, *rest),
        "merged_weight": lambda: ops.merged_weight(W.half(), *rest, 7),
        "scaled_basis": lambda: ops.scaled_basis(A, lam, gam),
        "scaled_basis_backward": lambda: ops.scaled_basis_backward(
            torch.ones(basis.K, basis.d), A, lam, gam
        ),
        "fill_planes_": lambda: ops.fill_planes_(planes.clone(), 1, 1, 0, 0, basis.K, 5),
        "pack_dense": lambda: ops.pack_dense(B),
        "planes_to_lists": lambda: ops.planes_to_lists(planes, basis.K, True, False),
        "planes_to_dense": lambda: ops.planes_to_dense(planes, basis.K, 0.5, torch.half),
        "lists_to_dense": lambda: ops.lists_to_dense(offset, index, basis.K, 0.5, torch.half),
    }


@pytest.mark.parametrize("name", calls())
def test_no_call_keeps_memory(name):
    call = calls()[name]

    def times(number):
        for _ in range(number):
            call()

    times(200)
    before = soak.counts()["malloc"]
    times(2000)
    # Of the smallest block that malloc hands out, 32 bytes, not one in four calls.
    assert soak.counts()["malloc"] - before < 8 * 2000
