"""Autograd on the card: opcheck, gradcheck in float64, what is kept for backward, autocast."""

import pytest
import torch
from gpu_helpers import PATHS, in_turn, ops
from layer_cases import kept_by, make_layer

from randlora_ext import TernaryBasis, delta_weight, linear, scaled_basis
from randlora_ext.ops.ternary import operands

pytestmark = pytest.mark.gpu
# in, out, r, density: both packed forms in both orientations
BASES = {
    "lists": (9, 5, 2, 0.12),
    "lists reduce": (5, 9, 2, 0.12),
    "planes": (9, 5, 2, 1 / 3),
    "planes reduce": (5, 9, 2, 1 / 3),
}
CASES = pytest.mark.parametrize("name, way", list(zip(BASES, PATHS, strict=True)), ids=str)


def tensors(device, name, dtype=torch.float32):
    basis = TernaryBasis(*BASES[name], seed=4)  # with elements in A and B of each
    make = torch.Generator().manual_seed(0)

    def normal(*shape):
        t = torch.randn(shape, generator=make, dtype=torch.float64)
        return t.to(device, dtype).requires_grad_()

    return {
        "basis": basis,
        "bases": operands(basis, device, 0.5),
        "x": normal(1, 3, basis.in_features),
        "weight": normal(basis.out_features, basis.in_features),
        "bias": normal(basis.out_features),
        "lam": normal(basis.r, basis.n),
        "gam": normal(basis.n, basis.d),
        "dy": normal(1, 3, basis.out_features),
    }


def b_dense(t, b_side, dtype=torch.float32):
    return t["basis"].dense_b(t["x"].device, dtype) if b_side == "dense" else None


def check(op, *arguments):
    torch.library.opcheck(op.default, arguments)


@pytest.mark.slow
@CASES
def test_opcheck_linear(device, name, way):
    t, (path, b_side) = tensors(device, name), way
    rest = (t["lam"], t["gam"], *t["bases"], path, b_dense(t, b_side))
    check(ops.linear, t["x"], t["weight"], t["bias"], *rest)
    if path != "merged":
        check(ops.linear, t["x"], None, None, *rest)
    t = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in t.items()}
    rest = (t["lam"], t["gam"], *t["bases"], path, b_dense(t, b_side))
    for needs in ((True, True), (True, False), (False, True)):
        check(ops.linear_backward, t["dy"], t["x"], t["weight"], *rest, *needs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lists", "planes reduce"])
def test_opcheck_the_others(device, name):
    t = tensors(device, name)
    basis, sizes = t["basis"], (t["basis"].out_features, t["basis"].in_features)
    check(ops.delta_weight, t["lam"], t["gam"], *t["bases"])
    lam, gam = t["lam"].detach(), t["gam"].detach()
    G = torch.ones(sizes, device=device)
    check(ops.delta_weight_backward, G, lam, gam, *t["bases"])
    A = basis.dense_a(device, torch.bfloat16)
    check(ops.scaled_basis, A, t["lam"], t["gam"])
    grad = torch.ones(basis.K, basis.d, dtype=A.dtype, device=device)
    check(ops.scaled_basis_backward, grad, A, lam, gam)


@pytest.mark.slow
def test_opcheck_packing(device):
    basis = TernaryBasis(11, 70, 3, 1 / 3)
    planes = basis.packed(device)[3]
    for by_column in (False, True):
        for wide in (False, True):
            check(ops.planes_to_lists, planes, basis.K, by_column, wide)
    check(ops.planes_to_dense, planes, basis.K, 0.5, torch.float16)
    lists = ops.planes_to_lists(planes, basis.K, False, False)
    check(ops.lists_to_dense, *lists, basis.K, 0.5, torch.float32)
    check(ops.pack_dense, basis.dense(device)[1])
    check(ops.fill_planes_, torch.zeros_like(planes), 1, 1, 0, 0, basis.K, 5)


@CASES
def test_gradcheck_linear(device, name, way):
    t, (path, b_side) = tensors(device, name, torch.float64), way
    rest = (*t["bases"], path, b_dense(t, b_side, torch.float64))
    leaves = [t[k] for k in ("x", "weight", "bias", "lam", "gam")]
    assert torch.autograd.gradcheck(lambda *a: ops.linear(*a, *rest), leaves)
    if path != "merged":
        assert torch.autograd.gradcheck(
            lambda x, lam, gam: ops.linear(x, None, None, lam, gam, *rest),
            [t[k] for k in ("x", "lam", "gam")],
        )


@pytest.mark.parametrize("name", ["lists reduce", "planes"])
def test_gradcheck_delta_weight_and_scaled_basis(device, name):
    t = tensors(device, name, torch.float64)
    diagonals = t["lam"], t["gam"]
    assert torch.autograd.gradcheck(lambda *a: delta_weight(t["basis"], *a, 0.5), diagonals)
    assert torch.autograd.gradcheck(lambda *a: scaled_basis(t["basis"], *a), diagonals)


@pytest.mark.parametrize(
    "way, density, shape",
    in_turn([(50, 37, 7), (37, 50, 7)], PATHS, [1 / 3, 0.07]),
    ids=str,
)
def test_only_x_and_the_diagonals_are_kept(device, monkeypatch, shape, density, way):
    (path, b_side), dtype = way, torch.bfloat16 if density == 0.07 else torch.float32
    monkeypatch.setenv("RANDLORA_B_SIDE", b_side)
    layer = make_layer(*shape, density, 20, dtype)
    basis, weight = layer.basis, layer.weight.to(device)
    x, lam, gam = (t.to(device).requires_grad_() for t in (layer.x, layer.lam, layer.gam))
    kept, y = kept_by(lambda: linear(x, weight, None, basis, lam, gam, 0.5, path))
    bases = [*basis.packed(device), *([basis.dense_b(device, dtype)] * (b_side == "dense"))]
    allowed = {t.untyped_storage().data_ptr() for t in (x, weight, lam, gam, *bases)}
    assert kept and all(t.untyped_storage().data_ptr() in allowed for t in kept)
    y.backward(layer.dy.to(device))  # and it suffices
    assert lam.grad.any() and gam.grad.any() and x.grad.any()


@pytest.mark.parametrize(
    "path, dtype",
    in_turn([torch.bfloat16, torch.float16], ["factored", "delta", "merged", "auto"]),
    ids=str,
)
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
