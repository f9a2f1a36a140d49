"""Autograd on the card: opcheck, what is kept for backward, autocast.

tests/ops/test_autograd.py checks the gradients of the CPU kernels, test_gpu_parity.py compares."""

from itertools import product

import pytest
import torch
from gpu_helpers import PATHS, ops
from layer_cases import make_layer

from randlora_ext import TernaryBasis, linear
from randlora_ext.ops.ternary import operands

pytestmark = pytest.mark.gpu
# in, out, r, density: both packed forms in both orientations
BASES = {
    "lists": (9, 5, 2, 0.12),
    "lists reduce": (5, 9, 2, 0.12),
    "planes": (9, 5, 2, 1 / 3),
    "planes reduce": (5, 9, 2, 1 / 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("path, b_side", PATHS, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_opcheck(device, name, path, b_side):
    layer = make_layer(*BASES[name], 3, torch.float32, lead=(1,))
    x, weight, bias, lam, gam, dy = (
        getattr(layer, name).to(device) for name in ("x", "weight", "bias", "lam", "gam", "dy")
    )
    basis, bases = layer.basis, operands(layer.basis, device, 0.5)
    rest = path, basis.dense_b(device, torch.float32) if b_side == "dense" else None
    calls = [
        (ops.linear_backward, dy, x, weight, lam, gam, *bases, *rest, *needs)
        for needs in ((True, True), (True, False), (False, True))
    ]
    leaves = [t.clone().requires_grad_() for t in (x, lam, gam)]
    calls.append((ops.linear, leaves[0], weight, bias, *leaves[1:], *bases, *rest))
    if (path, b_side) == PATHS[0]:  # once a basis
        A, K = basis.dense_a(device, torch.bfloat16), 12
        planes = TernaryBasis(11, 70, 3, 1 / 3).packed(device)[3]
        lists = ops.planes_to_lists(planes, K, False, False)
        calls += [
            (ops.delta_weight, *leaves[1:], *bases),
            (ops.delta_weight_backward, weight, lam, gam, *bases),
            (ops.scaled_basis, A, *leaves[1:]),
            (ops.scaled_basis_backward, torch.ones_like(A).repeat(basis.n, 1), A, lam, gam),
            *((ops.planes_to_lists, planes, K, *o) for o in product((False, True), repeat=2)),
            (ops.planes_to_dense, planes, K, 0.5, torch.float16),
            (ops.lists_to_dense, *lists, K, 0.5, torch.float32),
            (ops.pack_dense, basis.dense(device)[1]),
            (ops.fill_planes_, torch.zeros_like(planes), 1, 1, 0, 0, K, 5),
        ]
    for op, *arguments in calls:
        torch.library.opcheck(op.default, tuple(arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path, b_side", PATHS, ids=str)
@pytest.mark.parametrize("density", [1 / 3, 0.07])
@pytest.mark.parametrize("shape", [(50, 37, 7), (37, 50, 7)], ids=str)
def test_only_x_and_the_diagonals_are_kept(
    device, monkeypatch, shape, density, path, b_side, dtype
):
    monkeypatch.setenv("RANDLORA_B_SIDE", b_side)
    layer = make_layer(*shape, density, 20, dtype)
    basis, weight = layer.basis, layer.weight.to(device)
    x, lam, gam = (t.to(device).requires_grad_() for t in (layer.x, layer.lam, layer.gam))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(x, weight, None, basis, lam, gam, 0.5, path)
    bases = [*basis.packed(device), *([basis.dense_b(device, dtype)] * (b_side == "dense"))]
    allowed = {t.untyped_storage().data_ptr() for t in (x, weight, lam, gam, *bases)}
    assert kept and all(t.untyped_storage().data_ptr() in allowed for t in kept)
    y.backward(layer.dy.to(device))  # and it suffices
    assert lam.grad.any() and gam.grad.any() and x.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", ["factored", "delta", "merged", "auto"])
def test_autocast_casts_as_linear_does(device, path, dtype):
    layer = make_layer(50, 37, 7, 0.07, 20, torch.float32)
    x, weight, bias, lam, gam = (
        t.to(device) for t in (layer.x, layer.weight, layer.bias, layer.lam, layer.gam)
    )
    last = (layer.basis, lam, gam, 0.75, path)
    with torch.autocast(device.type, dtype):
        y = linear(x, weight, bias, *last)
    low = [t.to(dtype) for t in (x, weight, bias)]
    assert y.dtype == dtype and torch.equal(y, linear(*low, *last))
