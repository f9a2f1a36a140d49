"""torch.use_deterministic_algorithms(True): nothing of ours refuses it, and no bit changes."""

import pytest
import torch
from layer_cases import CALLS, make_basis, make_layer, one_thread, ours  # noqa: F401

from randlora_ext import TernaryBasis, delta_weight, merged_weight, scaled_basis
from randlora_ext.ops.ternary import operands

ops = torch.ops.randlora


@pytest.fixture
def deterministic():
    """The mode, with its habit of filling new memory with NaN, so that none is read unwritten."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )

    def switch(on):
        torch.use_deterministic_algorithms(on)
        torch.utils.deterministic.fill_uninitialized_memory = True

    yield switch
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def assert_mode_changes_nothing(switch, function):
    switch(False)
    expected = function()
    switch(True)
    for _ in range(2):
        for result, wanted in zip(function(), expected, strict=True):
            assert torch.equal(result, wanted)


@CALLS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_linear(deterministic, dtype, basis, path):
    layer = make_layer(157, 93, 9, basis, 70, dtype)
    assert_mode_changes_nothing(deterministic, lambda: list(ours(layer, path).values()))
    if path != "merged":
        part = layer.without_weight()
        assert_mode_changes_nothing(deterministic, lambda: list(ours(part, path).values()))


@pytest.mark.parametrize("density", [1 / 3, 0.07])
def test_the_other_operators(deterministic, density):
    layer = make_layer(157, 93, 9, density, 1, torch.float32)
    basis, lam, gam = layer.basis, layer.lam, layer.gam
    dense_a, dense_b = basis.dense()
    weight, grad = layer.weight.bfloat16(), torch.ones_like(layer.weight)

    def run():
        fresh = TernaryBasis(157, 93, 9, density, seed=6)
        packed = fresh._make(torch.device("cpu"), None)  # no cache: every operator of packing runs
        return [
            *packed, *fresh.dense(), *ops.pack_dense(dense_b),
            delta_weight(basis, lam, gam), scaled_basis(basis, lam, gam),
            merged_weight(basis, weight, lam, gam, rounding_seed=3),
            *ops.delta_weight_backward(grad, lam, gam, *operands(basis, "cpu", 0.5)),
            *ops.scaled_basis_backward(torch.ones(basis.K, basis.d), dense_a, lam, gam),
        ]  # fmt: skip

    assert_mode_changes_nothing(deterministic, run)


@pytest.mark.parametrize("shape", [(157, 93, 9), (93, 157, 9)], ids=str)
def test_the_other_operators_on_hadamard_bases(deterministic, shape):
    layer = make_layer(*shape, "hadamard", 1, torch.float32)
    weight, grad = layer.weight.bfloat16(), torch.ones_like(layer.weight)

    def run():
        fresh = make_basis(*shape, "hadamard", seed=6)
        leaves = [t.detach().clone().requires_grad_() for t in (layer.lam, layer.gam)]
        dW = delta_weight(fresh, *leaves)
        return [
            *fresh._make(torch.device("cpu"), None), *fresh.dense(),
            dW.detach(), *torch.autograd.grad(dW, leaves, grad),
            merged_weight(fresh, weight, *leaves, rounding_seed=3),
        ]  # fmt: skip

    assert_mode_changes_nothing(deterministic, run)
