"""Autograd on the card: opcheck, gradcheck in float64, what is kept for backward, autocast."""

import pytest
import torch
from gpu_helpers import LOW, PATHS, cases, in_turn, ops
from layer_cases import call, kept_by, make_layer, with_operands

from randlora_ext import delta_weight, scaled_basis

pytestmark = pytest.mark.gpu
# in, out, r, density: both packed forms in both orientations
BASES = {
    "lists": (9, 5, 2, 0.12),
    "lists reduce": (5, 9, 2, 0.12),
    "planes": (9, 5, 2, 1 / 3),
    "planes reduce": (5, 9, 2, 1 / 3),
}
CASES = cases("name, way", list(zip(BASES, PATHS, strict=True)))


def tensors(device, name, way, dtype=torch.float32):
    """A layer, what describes its basis, and what follows that in calls of `linear`."""
    path, b_side = way
    layer, bases = with_operands(BASES[name], dtype, device)
    return layer, bases, (path, layer.basis.dense_b(device, dtype) if b_side == "dense" else None)


@CASES
def test_gradcheck(device, name, way):
    t, bases, last = tensors(device, name, way, torch.float64)
    gradcheck, rest, diagonals = torch.autograd.gradcheck, (*bases, *last), (t.lam, t.gam)
    assert gradcheck(lambda *a: ops.linear(*a, *rest), (t.x, t.weight, t.bias, *diagonals))
    if way[0] != "merged":
        assert gradcheck(lambda x, *a: ops.linear(x, None, None, *a, *rest), (t.x, *diagonals))
    assert gradcheck(lambda *a: delta_weight(t.basis, *a, 0.5), diagonals)
    assert gradcheck(lambda *a: scaled_basis(t.basis, *a), diagonals)


@cases("way, density, shape", in_turn([(50, 37, 7), (37, 50, 7)], PATHS, [1 / 3, 0.07]))
def test_only_x_and_the_diagonals_are_kept(device, monkeypatch, shape, density, way):
    (path, b_side), dtype = way, torch.bfloat16 if density == 0.07 else torch.float32
    monkeypatch.setenv("RANDLORA_B_SIDE", b_side)
    layer = make_layer(*shape, density, 20, dtype).to(device)
    basis = layer.basis
    x, lam, gam = (t.requires_grad_() for t in (layer.x, layer.lam, layer.gam))
    kept, y = kept_by(lambda: call(layer, path))
    bases = [*basis.packed(device), *([basis.dense_b(device, dtype)] * (b_side == "dense"))]
    allowed = {t.untyped_storage().data_ptr() for t in (x, layer.weight, lam, gam, *bases)}
    assert kept and all(t.untyped_storage().data_ptr() in allowed for t in kept)
    y.backward(layer.dy)  # and it suffices
    assert lam.grad.any() and gam.grad.any() and x.grad.any()


@cases("path, dtype", in_turn(LOW[1:], ["factored", "delta", "merged", "auto"]))
def test_autocast_casts_as_linear_does(device, path, dtype):
    layer = make_layer(50, 37, 7, 0.07, 20, torch.float32).to(device)
    low = {name: getattr(layer, name).to(dtype) for name in ("x", "weight", "bias")}
    with torch.autocast(device.type, dtype):
        y = call(layer, path)
    assert y.dtype == dtype and torch.equal(y, call(layer, path, **low))
