"""NaN and inf reach what they touch, as in PyTorch, and nothing else."""

import math

import pytest
import torch
from layer_cases import CALLS, call, make_layer, ours
from torch.nn import functional as F

SHAPES = pytest.mark.parametrize("shape", [(50, 37, 7), (37, 50, 7)], ids=str)
VALUES = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@VALUES
@CALLS
def test_a_token_spoils_itself_only(shape, basis, dtype, value):
    layer = make_layer(*shape, basis, 40, dtype)
    clean, base = call(layer), F.linear(layer.x, layer.weight)
    for row in (0, 17, 39):
        x = layer.x.clone()
        x[row, 3] = value
        others = torch.arange(40) != row
        if not torch.equal(F.linear(x, layer.weight)[others], base[others]):
            assert dtype == torch.bfloat16
            pytest.skip("torch's own product in bfloat16 spoils other tokens on this processor")
        y = call(layer, x=x)
        assert not y[row].isfinite().any()  # W has no zeros: as of F.linear
        if math.isnan(value):
            assert y[row].isnan().all()
        assert torch.equal(y[others], clean[others])


@SHAPES
@pytest.mark.parametrize("density", [1 / 3, 0.07], ids=["planes", "lists"])
@VALUES
@pytest.mark.parametrize("which", ["lam", "gam"])
def test_diagonals_spoil_what_they_are_connected_to(shape, density, value, which):
    # Zeros of a sparse matrix are absent, not multiplied: an infinite lam[j, i] reaches the
    # outputs that base (j, i) is connected to. A dense product would spoil all (inf * 0).
    layer = make_layer(*shape, density, 20, torch.float64).without_weight()
    basis = layer.basis
    clean = call(layer)
    A, B = basis.dense(dtype=torch.float64)
    j, k = (A != 0).nonzero()[0].tolist()
    i = (B.view(basis.D, basis.r, basis.n)[:, j] != 0).nonzero()[0, 1].item()
    diagonal = getattr(layer, which).clone()
    diagonal[(j, i) if which == "lam" else (i, k)] = value
    mask = torch.zeros(basis.r, basis.n, basis.d)
    if which == "lam":
        mask[j, i] = A[j].abs()
    else:
        mask[:, i, k] = A[:, k].abs()
    reached = B.abs().float() @ mask.flatten(0, 1) > 0  # entries of dW, (D, d)
    outputs = reached.any(1) if basis.d == shape[0] else reached.any(0)
    y = call(layer, **{which: diagonal})
    assert outputs.any() and not y[:, outputs].isfinite().any()
    assert torch.equal(y[:, ~outputs], clean[:, ~outputs])


@SHAPES
@CALLS
def test_gradients(shape, basis):
    layer = make_layer(*shape, basis, 40, torch.float32)
    clean = ours(layer)
    layer.dy[17, 3] = math.nan
    results = ours(layer)
    others = torch.arange(40) != 17
    assert results["dx"][17].isnan().all()
    assert torch.equal(results["dx"][others], clean["dx"][others])
    # An optimiser step must see it: both gradients are spoiled, though not everywhere.
    assert results["dlam"].isnan().any() and results["dgam"].isnan().any()


@CALLS
def test_overflow_of_float16_is_infinite(basis):
    layer = make_layer(50, 37, 7, 1.0 if isinstance(basis, float) else basis, 4, torch.float16)
    y = call(layer, lam=layer.lam * 1e8)
    assert not y.isfinite().any()
