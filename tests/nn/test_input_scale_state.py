"""The input scale in copies and state dicts, and on other devices and in other dtypes."""

import copy

import pytest
import torch
from input_scale_nets import calibrated, layer_of, net
from layer_helpers import pickled, randomize, uneven
from torch import nn


def through_a_state_dict(source, target):
    other = copy.deepcopy(target)
    other.load_state_dict(source.state_dict())
    return other


WAYS = {
    "copy": lambda source, target: copy.deepcopy(source),
    "pickle": lambda source, target: pickled(source)[0],
    "state dict": through_a_state_dict,
}


@pytest.mark.parametrize("has_one", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_it_goes_where_the_adapter_goes(way, has_one):
    """Or is taken away, where the source has none and the target of a state dict has one."""
    scaled, bare = calibrated(), randomize(net())
    source, target = (scaled, bare) if has_one else (bare, scaled)
    arrived = WAYS[way](source, target)
    x = uneven(9, seed=2)
    assert torch.equal(arrived.eval()(x), source.eval()(x))
    assert arrived.one.is_calibrated("default") == has_one


def flipped(scale):
    """One bit is another: that of a sign."""
    return torch.cat([scale[:-1], -scale[-1:]])


BAD = {
    "shape": (lambda scale: scale[:24], r"is \(24,\), and must be \(40,\)"),
    "sign": (flipped, "must be positive and finite in every feature"),
    "nan": (lambda scale: scale.log() * torch.inf, "must be positive and finite in every feature"),
    "meta": (lambda scale: scale.to("meta"), r"has no numbers \(meta device\)"),
    "integers": (lambda scale: scale.ceil().int(), "is torch.int32, and must be floating point"),
    "missing": (None, "is missing: an adapter on Hadamard bases has one"),
}


KEY = "randlora_input_scale.default"


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside a model"])
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("assign", [False, True])
def test_what_does_not_fit_is_refused_before_the_layer_is_changed(case, assign, inside):
    change, message = BAD[case]
    layer = calibrated().two
    prefix, model = ("0.", nn.Sequential(layer)) if inside else ("", layer)
    before = copy.deepcopy(model.state_dict())
    given = before | {name: value + 1 for name, value in before.items() if "record" not in name}
    scale = given.pop(prefix + KEY)
    if change is not None:
        given[prefix + KEY] = change(scale)
    with pytest.raises(RuntimeError, match=f"{prefix}{KEY} {message}"):
        model.load_state_dict(given, strict=change is not None, assign=assign)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_that_a_model_calls_twice_loads_its_vector():
    def tied():
        layer = layer_of(24, 24)
        return nn.Sequential(layer, layer)

    one, other = randomize(tied()), tied()
    one[0].set_input_scale("default", torch.rand(24) + 0.5)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(uneven(3)), one(uneven(3)))


# ---- dtypes and devices --------------------------------------------------------------------------


def test_it_is_a_buffer():
    buffers = dict(calibrated().named_buffers())
    assert buffers.keys() == {f"{name}.randlora_input_scale.default" for name in ("one", "two")}


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "cpu", "share_memory"])
def test_it_stays_float32(cast):
    model = calibrated()
    scale = model.one.randlora_input_scale["default"].clone()
    after = getattr(model, cast)().one.randlora_input_scale["default"]
    assert after.dtype == torch.float32 and torch.equal(after, scale)


@pytest.mark.parametrize("assign", [False, True])
def test_it_is_loaded_as_float32(assign):
    given = {key: value.bfloat16() for key, value in calibrated().state_dict().items()}
    other = net()
    other.load_state_dict(given, assign=assign)
    loaded = other.one.randlora_input_scale["default"]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, given["one.randlora_input_scale.default"].float())
    # In contrast to the weight.
    assert other.two.base_layer.weight.dtype == (torch.bfloat16 if assign else torch.float32)


@pytest.fixture
def on_meta():
    return net().to("meta")


def test_on_the_meta_device_a_layer_is_not_calibrated(on_meta):
    assert on_meta.one.randlora_input_scale["default"].is_meta
    assert not on_meta.one.is_calibrated("default") and "not calibrated" in repr(on_meta.one)


def test_on_the_meta_device_it_cannot_be_set(on_meta):
    with pytest.raises(RuntimeError, match=r"adapter 'default' has no numbers \(meta device\)"):
        on_meta.one.set_input_scale("default", torch.ones(24))


def test_to_empty_makes_it_ones(on_meta):
    empty = on_meta.to_empty(device="cpu")
    assert torch.equal(empty.one.randlora_input_scale["default"], torch.ones(24))


def test_a_model_from_the_meta_device_loads_it(on_meta):
    model = on_meta.to_empty(device="cpu")
    model.load_state_dict(calibrated().state_dict())
    assert torch.equal(model(uneven(3)), calibrated()(uneven(3)))


@pytest.mark.parametrize("bad", [torch.zeros(24), torch.full((24,), torch.nan), torch.ones(40)])
def test_a_vector_that_is_set_by_its_path_must_be_one(bad):
    """As transformers' own loaders set it."""
    scales = calibrated().one.randlora_input_scale
    before = scales["default"].clone()
    with pytest.raises(
        ValueError, match="default (must be positive and finite|is .40,., and must)"
    ):
        scales.default = bad
    assert torch.equal(scales["default"], before)
    scales.default = torch.full((24,), 0.5, dtype=torch.float64)
    assert torch.equal(scales["default"], torch.full((24,), 0.5))
