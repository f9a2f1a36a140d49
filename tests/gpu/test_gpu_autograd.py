"""Autograd on the card: opcheck, gradcheck in float64, what is kept for backward, autocast."""

import pytest
import torch
from gpu_helpers import LOW, cases, ops
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


@cases("name", BASES)
def test_gradcheck(device, name):
    t, bases = with_operands(BASES[name], torch.float64, device)
    gradcheck, diagonals, op = torch.autograd.gradcheck, (t.lam, t.gam), ops.independent_linear
    assert gradcheck(lambda *a: op(*a, *bases), (t.x, t.weight, t.bias, *diagonals))
    assert gradcheck(lambda x, *a: op(x, None, None, *a, *bases), (t.x, *diagonals))
    assert gradcheck(lambda *a: delta_weight(t.basis, *a, 0.5), diagonals)
    assert gradcheck(lambda *a: scaled_basis(t.basis, *a), diagonals)


@cases("density", [1 / 3, 0.07])
@cases("shape", [(50, 37, 7), (37, 50, 7)])
def test_only_x_and_the_diagonals_are_kept(device, shape, density):
    dtype = torch.bfloat16 if density == 0.07 else torch.float32
    layer = make_layer(*shape, density, 20, dtype).to(device)
    basis = layer.basis
    x, lam, gam = (t.requires_grad_() for t in (layer.x, layer.lam, layer.gam))
    kept, y = kept_by(lambda: call(layer))
    bases = basis.packed(device)
    allowed = {t.untyped_storage().data_ptr() for t in (x, layer.weight, lam, gam, *bases)}
    assert kept and all(t.untyped_storage().data_ptr() in allowed for t in kept)
    y.backward(layer.dy)  # and it suffices
    assert lam.grad.any() and gam.grad.any() and x.grad.any()


@cases("dtype", LOW[1:])
def test_autocast_casts_as_linear_does(device, dtype):
    layer = make_layer(50, 37, 7, 0.07, 20, torch.float32).to(device)
    low = {name: getattr(layer, name).to(dtype) for name in ("x", "weight", "bias")}
    with torch.autocast(device.type, dtype):
        y = call(layer)
    assert y.dtype == dtype and torch.equal(y, call(layer, **low))
