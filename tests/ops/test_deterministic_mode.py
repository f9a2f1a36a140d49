"""torch.use_deterministic_algorithms(True): nothing of ours refuses it, and no bit changes."""

import pytest
import torch
from layer_cases import make_layer, one_thread, ours  # noqa: F401

from randlora_ext import TernaryBasis, delta_weight, merged_weight, scaled_basis

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


@pytest.mark.parametrize("path", ["factored", "delta", "merged"])
@pytest.mark.parametrize("density", [1 / 3, 0.07])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_linear(deterministic, dtype, density, path):
    layer = make_layer(157, 93, 9, density, 70, dtype)
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
            *ops.delta_weight_backward(grad, lam, gam, basis.packed(), 0.5),
            *ops.scaled_basis_backward(torch.ones(basis.K, basis.d), dense_a, lam, gam),
        ]  # fmt: skip

    assert_mode_changes_nothing(deterministic, run)
