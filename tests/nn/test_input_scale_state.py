"""The input scale in copies, state dicts and files, and on other devices and in other dtypes."""

import copy

import pytest
import torch
from input_scale_nets import Net, calibrated, net
from layer_helpers import pickled, randomize, uneven
from torch import nn

import randlora_ext
from randlora_ext import calibrate


def through_a_state_dict(source, target):
    other = copy.deepcopy(target)
    other.load_state_dict(source.state_dict())
    return other


def through_a_file(source, folder):
    randlora_ext.save_adapter(source, folder)
    return randlora_ext.load_adapter(Net(), folder)


WAYS = {
    "copy": lambda source, target, folder: copy.deepcopy(source),
    "pickle": lambda source, target, folder: pickled(source)[0],
    "state dict": lambda source, target, folder: through_a_state_dict(source, target),
    "file": lambda source, target, folder: through_a_file(source, folder),
}


@pytest.mark.parametrize("has_one", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_it_goes_where_the_adapter_goes(tmp_path, way, has_one):
    """Or is taken away, where the source has none and the target of a state dict has one."""
    scaled, bare = calibrated(), randomize(net())
    source, target = (scaled, bare) if has_one else (bare, scaled)
    arrived = WAYS[way](source, target, tmp_path / "adapter")
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
    "missing": (None, "is missing: adapters on Hadamard bases have one"),
}


KEY = "two.randlora_input_scale.default"  # of the last layer


@pytest.mark.parametrize("prefix", ["", "0."], ids=["alone", "inside a model"])
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("assign", [False, True])
def test_what_does_not_fit_the_last_layer_is_refused_before_the_first_is_loaded(
    case, assign, prefix
):
    change, message = BAD[case]
    model = calibrated()
    before = copy.deepcopy(model.state_dict())
    given = {prefix + name: value + 1 for name, value in before.items()}
    scale = given.pop(prefix + KEY)
    if change is not None:
        given[prefix + KEY] = change(scale)
    target = nn.Sequential(model) if prefix else model
    with pytest.raises(RuntimeError, match=f"{KEY} {message}"):
        target.load_state_dict(given, strict=change is not None, assign=assign)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def tied():
    layer = nn.Linear(24, 24)
    return randlora_ext.apply_randlora(nn.Sequential(layer, layer), ["0", "1"], r=5)


@pytest.fixture
def calibrated_tied():
    model = tied()
    calibrate(model, [uneven(9)])
    return randomize(model)


def test_a_tied_layer_loads_its_vector(calibrated_tied):
    assert calibrated_tied[0] is calibrated_tied[1]
    other = tied()
    other.load_state_dict(calibrated_tied.state_dict())
    assert torch.equal(other(uneven(3)), calibrated_tied(uneven(3)))


def test_a_tied_layer_refuses_two_different_vectors(calibrated_tied):
    one, two = (f"{i}.randlora_input_scale.default" for i in range(2))
    before = copy.deepcopy(calibrated_tied.state_dict())
    with pytest.raises(RuntimeError, match=f"{two} differs from {one}, and both are of one tied"):
        calibrated_tied.load_state_dict(before | {two: before[two] * 2})
    after = calibrated_tied.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def squares(tied):
    torch.manual_seed(0)
    layers = [nn.Linear(24, 24), nn.Linear(24, 24)]
    return nn.Sequential(layers[0], layers[0] if tied else layers[1])


@pytest.fixture
def two_layers():
    """Not tied, with equal vectors."""
    model = randlora_ext.apply_randlora(squares(tied=False), ["0", "1"], r=5)
    scale = torch.rand(24) + 0.5
    for layer in model:
        layer.set_input_scale("default", scale)
    return model


def test_a_file_of_two_layers_with_equal_vectors_fits_a_tied_layer(tmp_path, two_layers):
    randlora_ext.save_adapter(two_layers, tmp_path)
    opened = randlora_ext.load_adapter(squares(tied=True), tmp_path)
    assert opened[0] is opened[1]
    scales = [model[0].randlora_input_scale["default"] for model in (opened, two_layers)]
    assert torch.equal(*scales)


def test_a_file_of_two_layers_with_other_vectors_does_not_fit_a_tied_layer(tmp_path, two_layers):
    two_layers[1].set_input_scale("default", None)
    randlora_ext.save_adapter(two_layers, tmp_path)
    bare = squares(tied=True)
    with pytest.raises(ValueError, match="1: it is tied to 0, whose tensors differ"):
        randlora_ext.load_adapter(bare, tmp_path)
    assert type(bare[0]) is nn.Linear


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
