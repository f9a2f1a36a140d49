"""`merged_weight`: W + dW rounded once, to nearest or stochastically."""

import pytest
import torch
from layer_cases import make_layer
from layer_helpers import make_base, randomize

from randlora_ext import RandLoraLinear, delta_weight, merged_weight
from randlora_ext.reference import delta_weight_reference

SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def make(in_features, out_features, r, kind, dtype):
    layer = make_layer(in_features, out_features, r, kind, 1, dtype)
    return layer.basis, layer.weight, layer.lam, layer.gam


def total(basis, weight, lam, gam, scaling):
    A, B = basis.dense(dtype=torch.float64)
    shape = basis.out_features, basis.in_features
    dW = delta_weight_reference(A, B, lam.double(), gam.double(), scaling, *shape)
    return weight.double() + dW


@pytest.mark.parametrize("kind", [0.05, 1 / 3, "hadamard", "dense"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 40, 8), (33, 70, 8), (70, 33, 7), (20, 30, 32)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_of_the_sum(shape, kind, dtype):
    basis, weight, lam, gam = make(*shape, kind, dtype)
    got, want = merged_weight(basis, weight, lam, gam, 0.5), total(basis, weight, lam, gam, 0.5)
    assert got.dtype == dtype and got.shape == weight.shape
    ulp = torch.finfo(dtype).eps * want.abs()
    noise = (1e-12 if dtype == torch.float64 else 1e-5) * want.abs().max()
    if kind == "dense" and dtype.itemsize == 2:  # A' and B are rounded, too
        noise = noise + 4 * torch.finfo(dtype).eps * (want - weight.double()).square().mean().sqrt()
    assert bool(((got.double() - want).abs() <= ulp / 2 + noise).all())
    if dtype.itemsize == 2:
        seeded = merged_weight(basis, weight, lam, gam, 0.5, 2**64 - 1)
        assert bool(((seeded.double() - want).abs() <= ulp + noise).all())
    else:
        assert (got.double() - want).norm() < 4 * torch.finfo(dtype).eps * want.norm()


@SIXTEEN_BITS
@pytest.mark.parametrize("kind", [0.1, "hadamard", "dense"])
def test_stochastic_rounding_keeps_what_nearest_loses(kind, dtype):
    basis, weight, lam, gam = make(96, 130, 8, kind, dtype)
    weight = torch.ones_like(weight)
    scaling = 0.02 * torch.finfo(dtype).eps  # changes of a few hundredths of an ulp
    change = delta_weight(basis, lam.float(), gam.float(), scaling)
    assert torch.equal(merged_weight(basis, weight, lam, gam, scaling), weight)
    drawn = [merged_weight(basis, weight, lam, gam, scaling, seed) for seed in range(200)]
    assert torch.equal(drawn[7], merged_weight(basis, weight, lam, gam, scaling, 7))
    assert not torch.equal(drawn[7], drawn[8])
    mean = torch.stack(drawn).double().mean(0)
    # The share of the change that survives, by regression over all elements: 1 without bias.
    kept = ((mean - 1) * change).sum() / (change.double() ** 2).sum()
    assert abs(kept - 1) < 0.1


@pytest.mark.parametrize("kind", [1 / 3, "hadamard", "dense"])
def test_errors(kind):
    basis, weight, lam, gam = make(33, 70, 8, kind, torch.float32)
    with pytest.raises(
        ValueError, match=r"weight must be \(out, in\) = \(70, 33\), got \(33, 70\)"
    ):
        merged_weight(basis, weight.T, lam, gam)
    with pytest.raises(RuntimeError, match="bfloat16 or float16"):
        merged_weight(basis, weight, lam, gam, 1.0, 5)
    for wrong, error in ((-1, ValueError), (2**64, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="rounding_seed must be"):
            merged_weight(basis, weight.bfloat16(), lam, gam, 1.0, wrong)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_layer_merges_with_a_seed(kind):
    layer = randomize(RandLoraLinear(make_base(24, 40, kind, dtype=torch.bfloat16), r=5))
    before, delta = layer.weight.clone(), layer.get_delta_weight("default").detach()
    layer.merge(rounding_seed=7)
    error = (layer.weight.double() - (before.double() + delta.double())).abs()
    assert error.max() <= torch.finfo(torch.bfloat16).eps * (before.abs() + delta.abs()).max()
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_layer_refuses_a_seed_that_cannot_serve():
    layer = randomize(RandLoraLinear(make_base(24, 40), r=5))
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="rounding_seed rounds one adapter into a 16-bit weight"):
        layer.merge(rounding_seed=7)
    assert not layer.merged and torch.equal(layer.weight, before)
