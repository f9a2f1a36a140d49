"""The input scale, which `calibrate` or `set_input_scale` gives: what it does, and is refused.

test_input_scale_state.py has where it goes.
"""

import pytest
import torch
from input_scale_nets import calibrated, layer_of
from layer_helpers import assert_right, inputs, randomize, relative, uneven
from torch import nn

from randlora_ext import RandLoraLinear

# ---- what it does --------------------------------------------------------------------------------

SIZES = [(24, 40), (40, 24), (33, 33), (6, 90)]
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def scaled_layer(sizes, dtype):
    """A layer with an input scale, and that scale."""
    layer = randomize(RandLoraLinear(nn.Linear(*sizes).to(dtype), r=5, basis="hadamard"))
    scale = torch.rand(sizes[0]) + 0.1
    layer.set_input_scale("default", scale)
    return layer, scale


@pytest.mark.parametrize("sizes, dtype", zip(SIZES, LIMITS, strict=True), ids=str)
def test_it_scales_the_columns_of_the_update(sizes, dtype):
    layer, scale = scaled_layer(sizes, dtype)
    after = layer.get_delta_weight("default")
    layer.set_input_scale("default", torch.ones(sizes[0]))
    before = layer.get_delta_weight("default")
    assert relative(after, before.double() * scale.double()) < max(LIMITS[dtype], 1e-6)


@pytest.mark.parametrize("sizes, dtype", zip(SIZES, LIMITS, strict=True), ids=str)
def test_outputs_and_gradients_are_those_of_the_scaled_update(sizes, dtype):
    layer, _ = scaled_layer(sizes, dtype)
    assert_right(layer, *inputs(layer, 2, 7, dtype=dtype), LIMITS[dtype])


def test_ones_restore_the_update():
    layer = randomize(layer_of(basis="hadamard"))
    before = layer.get_delta_weight("default")
    layer.set_input_scale("default", torch.rand(24) + 0.1)
    layer.set_input_scale("default", torch.ones(24))
    assert torch.equal(layer.get_delta_weight("default"), before)


def test_a_layer_says_whether_it_is_calibrated():
    layer = layer_of(basis="hadamard")
    assert "hadamard (not calibrated) by" in repr(layer)
    layer.set_input_scale("default", torch.rand(24) + 0.1)
    assert "hadamard (calibrated) by" in repr(layer)


def test_merging_adds_the_scaled_update():
    model, x = calibrated().eval(), uneven(9, seed=2)
    want = model(x)
    model.one.merge()
    model.two.merge()
    assert relative(model(x), want) < 1e-5


def test_unmerging_restores_every_bit():
    layer = calibrated().one
    kept = layer.base_layer.weight.clone()
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, kept)


def test_a_layer_on_independent_bases_has_none():
    layer = layer_of(density=0.3)
    assert not layer.is_calibrated("default") and not layer.randlora_input_scale


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.ones(40), r"must be \(in_features,\) = \(24,\), got \(40,\)"),
        (torch.zeros(24), "positive and finite"),
        (torch.full((24,), torch.nan), "positive and finite"),
        ([1.0] * 24, "must be a floating tensor"),
        (torch.ones(24, dtype=torch.long), "must be a floating tensor"),
        (None, "must be a floating tensor, got None"),
    ],
    ids=str,
)
def test_a_vector_that_does_not_fit(bad, message):
    layer = layer_of(basis="hadamard")
    with pytest.raises((TypeError, ValueError), match=message):
        layer.set_input_scale("default", bad)
    assert not layer.is_calibrated("default")


def test_independent_bases_take_no_vector():
    with pytest.raises(ValueError, match="goes with Hadamard bases, got kind='independent'"):
        layer_of(density=0.3).set_input_scale("default", torch.ones(24))


@pytest.fixture
def merged():
    layer = layer_of(basis="hadamard")
    layer.merge()
    return layer


def test_a_merged_layer_takes_no_vector(merged):
    with pytest.raises(RuntimeError, match="is merged; unmerge it first"):
        merged.set_input_scale("default", torch.ones(24))


def test_a_merged_layer_loads_no_vector(merged):
    state = {"randlora_input_scale.default": torch.ones(24)}
    with pytest.raises(RuntimeError, match=r"the layer has merged \['default'\] into its weight"):
        merged.load_state_dict(state, strict=False)


# ---- under torch's transforms --------------------------------------------------------------------


@pytest.fixture
def model():
    return calibrated().eval()


@pytest.fixture
def x():
    return uneven(9, seed=2)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(model, x, strict):
    exported = torch.export.export(model, (x,), strict=strict).module()
    assert torch.equal(exported(x), model(x))


def test_mapped(model, x):
    assert relative(torch.vmap(model)(x[:, None])[:, 0], model(x)) < 1e-5


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def test_compiled(model, x):
    assert torch.equal(compiled(model)(x), model(x))


def load_another(model):
    state = model.state_dict()
    model.load_state_dict(state | {"one.randlora_input_scale.default": torch.rand(24) + 0.5})


CHANGES = {
    "set": lambda model: model.one.set_input_scale("default", torch.ones(24)),
    "loaded": load_another,
    "in place": lambda model: model.one.randlora_input_scale["default"].mul_(1.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_compiled_code_notices_a_change(model, x, change):
    fast, before = compiled(model), model(x)
    assert torch.equal(fast(x), before)
    CHANGES[change](model)
    assert torch.equal(fast(x), model(x)) and not torch.equal(model(x), before)
