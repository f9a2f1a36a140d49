"""Autograd on the card: opcheck, gradcheck in float64, what is kept for backward, autocast."""

import pytest
import torch
from gpu_helpers import LOW, PATHS, cases, in_turn, ops
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
CASES = cases("name, way", list(zip(BASES, PATHS, strict=True)))


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
def test_opcheck(device, name, way):
    t, (path, b_side) = tensors(device, name), way
    lam, gam, bases = t["lam"], t["gam"], t["bases"]
    last = (*bases, path, b_dense(t, b_side))
    A = t["basis"].dense_a(device, torch.bfloat16)
    check(ops.linear, t["x"], t["weight"], t["bias"], lam, gam, *last)
    check(ops.delta_weight, lam, gam, *bases)
    check(ops.scaled_basis, A, lam, gam)
    dy, x, weight, lam, gam = (t[k].detach() for k in ("dy", "x", "weight", "lam", "gam"))
    check(ops.linear_backward, dy, x, weight, lam, gam, *last, True, True)
    check(ops.delta_weight_backward, torch.ones_like(weight), lam, gam, *bases)
    grad = A.new_ones(t["basis"].K, t["basis"].d)
    check(ops.scaled_basis_backward, grad, A, lam, gam)


@CASES
def test_gradcheck(device, name, way):
    t, (path, b_side) = tensors(device, name, torch.float64), way
    rest = (*t["bases"], path, b_dense(t, b_side, torch.float64))
    x, weight, bias, lam, gam = (t[k] for k in ("x", "weight", "bias", "lam", "gam"))
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(lambda *a: ops.linear(*a, *rest), (x, weight, bias, lam, gam))
    if path != "merged":
        assert gradcheck(lambda x, *a: ops.linear(x, None, None, *a, *rest), (x, lam, gam))
    assert gradcheck(lambda *a: delta_weight(t["basis"], *a, 0.5), (lam, gam))
    assert gradcheck(lambda *a: scaled_basis(t["basis"], *a), (lam, gam))


@cases("way, density, shape", in_turn([(50, 37, 7), (37, 50, 7)], PATHS, [1 / 3, 0.07]))
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


@cases("path, dtype", in_turn(LOW[1:], ["factored", "delta", "merged", "auto"]))
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
