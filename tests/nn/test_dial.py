"""`set_dial`: what it multiplies, where the factor goes, and what it refuses."""

import pytest
import torch
from layer_helpers import adapt, layers, randomize, relative
from torch import nn

from randlora_ext import set_dial
from randlora_ext.dial import dialed

X = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))
    return randomize(adapt(net, "0", "2", r=4))


def deltas(model):
    return [layer.get_delta_weight("default").detach() for layer in layers(model).values()]


def lambdas(model):
    return [layer.randlora_lambda["default"].data for layer in layers(model).values()]


def test_a_factor_multiplies_dw():
    ours = model()
    set_dial(ours, 0.5)  # exact
    for now, was in zip(deltas(ours), deltas(model()), strict=True):
        assert torch.equal(now, was / 2)


def test_a_second_factor_multiplies_the_first():
    ours = model()
    set_dial(ours, 0.5)
    set_dial(ours, 1.4)
    for now, was in zip(deltas(ours), deltas(model()), strict=True):
        assert relative(now, was.double() * 0.7) < 1e-6


def test_tied_layers_are_multiplied_once():
    ours = model()
    ours.append(ours[0])
    before = lambdas(model())
    set_dial(ours, 0.5)
    assert all(map(torch.equal, lambdas(ours), [each / 2 for each in before]))


def test_a_factor_goes_into_state_dicts():
    ours, other = model(), model()
    set_dial(ours, 0.7)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(X), ours(X)) and not torch.equal(ours(X), model()(X))


def test_a_factor_goes_into_merged_weights():
    ours = model()
    set_dial(ours, 0.7)
    want = ours(X)
    for layer in layers(ours).values():
        layer.merge()
    assert relative(ours(X), want) < 1e-5


@pytest.mark.parametrize("factor", [0.0, 0.7])
def test_a_factor_for_a_while(factor):
    """Which no state dict has."""
    ours, turned = model(), model()
    for lam in lambdas(turned):
        lam.mul_(factor)
    before, out = lambdas(model()), ours(X)
    with dialed(layers(ours).values(), ["default", "another"], factor):
        assert relative(ours(X), turned(X)) < 1e-6
        assert all(map(torch.equal, lambdas(ours), before))
    assert torch.equal(ours(X), out)


def merged():
    ours = model()
    for layer in layers(ours).values():
        layer.merge()
    return ours


LOST = "factor .* would make lambda infinite or zero, in layer '[02]'"


@pytest.mark.parametrize(
    "make, given, error, told",
    [
        (model, (0,), ValueError, "factor must be a positive finite number, got 0"),
        (model, (-0.5,), ValueError, "factor must be a positive finite number, got -0.5"),
        (model, (torch.inf,), ValueError, "factor must be a positive finite number, got inf"),
        (model, (10**400,), ValueError, "must be a positive finite number, got an integer of 1329"),
        (model, (None,), TypeError, "factor must be a positive finite number, got None"),
        (model, (0.5, "two"), ValueError, "adapter_name must be one of"),
        (merged, (0.5,), ValueError, "is merged; unmerge it first"),
        (lambda: model().to("meta"), (0.5,), ValueError, "has no numbers"),
        (lambda: nn.Linear(2, 2), (0.5,), ValueError, "^model has no RandLoRA adapter"),
    ],
)
def test_what_is_refused(make, given, error, told):
    ours = make()
    before = [lam.clone() for lam in lambdas(ours)]
    with pytest.raises(error, match=told):
        set_dial(ours, *given)
    for lam, was in zip(lambdas(ours), before, strict=True):
        assert lam.is_meta or torch.equal(lam, was)


@pytest.mark.parametrize("factor, size", [(1e300, 1.0), (1e-300, 1.0), (1e10, 1e30), (1e-9, 1e-38)])
def test_a_factor_that_loses_numbers_is_refused(factor, size):
    """Even if only the last layer would lose them, the first stays as it was."""
    ours = model()
    lambdas(ours)[0].zero_()
    lambdas(ours)[1].fill_(size)
    before = [each.clone() for each in lambdas(ours)]
    with pytest.raises(ValueError, match=LOST):
        set_dial(ours, factor)
    assert all(map(torch.equal, lambdas(ours), before))


def test_an_element_that_is_too_small_for_its_dtype_becomes_zero():
    ours = model().half()
    lambdas(ours)[1][0, 0] = smallest = torch.finfo(torch.float16).smallest_normal * 2**-10
    assert smallest > 0 and lambdas(ours)[1][0, 0] == smallest
    before = [each.clone() for each in lambdas(ours)]
    set_dial(ours, 0.5)
    assert all(torch.equal(lam, 0.5 * was) for lam, was in zip(lambdas(ours), before, strict=True))
    assert not lambdas(ours)[1][0, 0]


def test_numbers_that_are_lost_already_do_not_matter():
    """Zeros of a new adapter, and what training has made infinite."""
    ours = model()
    lambdas(ours)[0].zero_()
    lambdas(ours)[1][0, 0] = torch.inf
    set_dial(ours, 0.5)
    assert not lambdas(ours)[0].any() and lambdas(ours)[1][0, 0] == torch.inf
