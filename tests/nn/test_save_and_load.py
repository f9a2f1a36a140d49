"""`save_adapter` and `load_adapter`: what a folder holds, and what comes back."""

import copy
import os

import pytest
import torch
from layer_helpers import layers, make_base, randomize
from saved_adapters import (
    CONFIG,
    WEIGHTS,
    Model,
    adapted,
    config_in,
    edit_config,
    names_in,
    tensors_in,
    two_squares,
    with_head,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from randlora_ext import RandLoraLinear, apply_randlora, load_adapter, save_adapter
from randlora_ext.nn.adapter_record import RECORD_KEY, read_record


@pytest.fixture
def x():
    return torch.randn(7, 16, generator=torch.Generator().manual_seed(3))


# ---- what the folder holds -----------------------------------------------------------------------


def test_a_folder_holds_two_files(folder):
    save_adapter(adapted(), folder)
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    assert os.listdir(folder.parent) == [folder.name]


def test_tensors_have_the_paths_of_their_layers(folder):
    save_adapter(adapted(), folder)
    paths, parts = ("up", "down", "block.up", "tied"), ("lambda", "gamma")
    assert names_in(folder) == {f"{path}.randlora_{part}" for path in paths for part in parts}


BASIS = f"randlora_ext:independent-1:density=0.3:seed={2**63 + 5}"
SIZES = {"up": (16, 24), "down": (24, 16), "block.up": (16, 16), "tied": (16, 16)}


@pytest.mark.parametrize("path", SIZES)
def test_a_record_says_to_which_configuration_a_layer_belongs(folder, path):
    save_adapter(adapted(), folder)
    key = f"base_model.model.{path}.{RECORD_KEY}"
    in_features, out_features = SIZES[path]
    assert read_record(key, tensors_in(folder)[key]) == {
        "projection_prng_key": BASIS,
        "r": 5,
        "randlora_alpha": 9,
        "target_parameters": [],
        "in_features": in_features,
        "out_features": out_features,
    }


def test_the_configuration_has_the_fields_of_peft(folder):
    save_adapter(adapted(), folder)
    fields = config_in(folder)
    assert fields.items() >= {
        "projection_prng_key": BASIS, "r": 5, "randlora_alpha": 9, "randlora_dropout": 0.0,
        "basis": "independent", "density": 0.3, "save_projection": False, "bias": "none",
        "target_parameters": None, "modules_to_save": None, "fan_in_fan_out": False,
    }.items()  # fmt: skip
    assert fields["target_modules"] == ["down", "tied", "up"]
    assert fields["peft_type"].startswith("RANDLORA; needs randlora_ext: import")


TARGETS = {
    "last names": (["up", "down", "tied"], ["down", "tied", "up"]),
    "a name that others have": (["block.up", "down"], r"down|block\.up"),
}


@pytest.mark.parametrize("targets, written", TARGETS.values(), ids=TARGETS)
def test_target_modules_match_the_layers_and_no_others(folder, targets, written):
    """As PEFT matches them."""
    model = apply_randlora(Model(), targets, r=2)
    save_adapter(model, folder)
    assert config_in(folder)["target_modules"] == written


# ---- what comes back -----------------------------------------------------------------------------


@pytest.fixture
def model():
    return adapted(randlora_dropout=0.25)


@pytest.fixture
def loaded(model, folder):
    save_adapter(model, folder)
    return load_adapter(Model(), folder)


def test_load_adapter_returns_the_model_that_it_was_given(model, folder):
    save_adapter(model, folder)
    base = Model()
    assert load_adapter(base, folder) is base


def test_outputs_come_back_bit_for_bit(model, loaded, x):
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_layers_come_back_with_bases_scaling_and_dropout(model, loaded):
    for name, layer in layers(model).items():
        other = layers(loaded)[name]
        assert other.extra_repr() == layer.extra_repr() and other.scaling == layer.scaling
        assert other.bases == layer.bases and other.randlora_dropout["default"].p == 0.25


def test_a_tied_layer_comes_back_tied(loaded):
    assert isinstance(loaded.tied, RandLoraLinear) and loaded.tied is loaded.block["up"]


def test_the_same_parameters_are_trained(model, loaded):
    trained = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]


def test_the_state_dict_has_the_same_keys(model, loaded):
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("alpha", [9, 0.7, 1e-3, 640, -20, 0, 1 / 3, 123456789.1])
@pytest.mark.parametrize("r", [3, 7, 30, 32])
def test_the_scaling_comes_back_bit_for_bit(folder, alpha, r):
    model = apply_randlora(Model(), ["down"], r=r, randlora_alpha=alpha)
    save_adapter(model, folder)
    assert layers(load_adapter(Model(), folder))["down"].scaling == layers(model)["down"].scaling


class Blocks(nn.Sequential):
    def __init__(self, count):
        super().__init__(*(nn.ModuleDict({"up": nn.Linear(8, 8)}) for _ in range(count)))


def test_a_model_of_more_layers_than_the_adapter_has(folder):
    save_adapter(apply_randlora(Blocks(2), ["up"], r=2), folder)
    with pytest.warns(UserWarning, match=r"nothing for 1 modules of the Blocks .*\['2\.up'\]"):
        model = load_adapter(Blocks(3), folder)
    assert [type(block["up"]) for block in model] == [RandLoraLinear, RandLoraLinear, nn.Linear]


def test_a_configuration_that_limits_its_target_modules_is_no_reason_to_warn(folder, recwarn):
    save_adapter(apply_randlora(Blocks(2), ["up"], r=2), folder)
    edit_config(folder, layers_to_transform=[0, 1])
    load_adapter(Blocks(3), folder)
    assert not [warning for warning in recwarn if "holds nothing" in str(warning.message)]


@pytest.mark.parametrize("layer_type", ["linear", "conv1d"])
def test_a_model_that_is_one_layer(folder, layer_type):
    layer = randomize(RandLoraLinear(make_base(8, 12, layer_type), r=3))
    save_adapter(torch.compile(layer), folder)
    other = RandLoraLinear(make_base(8, 12, layer_type), r=3)
    load_adapter(other, folder, "two")
    other.set_adapter("two")
    assert torch.equal(other(torch.ones(8)), layer(torch.ones(8)))


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_a_layer_that_is_wrapped_alone(folder, wrap):
    """The folder does not name the wrapper."""
    model = randomize(apply_randlora(two_squares(), ["0", "1"], r=2))
    base = nn.Sequential(*(copy.deepcopy(layer.base_layer) for layer in model))
    want = model(x := torch.randn(3, 8))
    model[0] = wrap(model[0])
    save_adapter(model, folder)
    assert torch.equal(load_adapter(base, folder)(x), want)


def test_a_merged_adapter_is_saved_as_it_is(folder, x):
    model = adapted()
    want = model(x)
    for layer in layers(model).values():
        layer.merge()
    save_adapter(model, folder)
    assert torch.equal(load_adapter(Model(), folder)(x), want)


# ---- several adapters ----------------------------------------------------------------------------


def other_adapted():
    return adapted(numbers=2, r=3, density=0.7)


@pytest.fixture
def model_of_two(folder):
    model = adapted()
    save_adapter(other_adapted(), folder)
    return load_adapter(model, folder, adapter_name="other")


def activate(model, adapter_name):
    for layer in layers(model).values():
        layer.set_adapter(adapter_name)


def test_an_adapter_that_is_loaded_beside_another_is_neither_active_nor_trained(model_of_two, x):
    assert torch.equal(model_of_two(x), adapted()(x))
    for layer in layers(model_of_two).values():
        assert not layer.randlora_lambda["other"].requires_grad


def test_an_adapter_that_is_loaded_beside_another_can_be_activated(model_of_two, x):
    activate(model_of_two, "other")
    assert torch.equal(model_of_two(x), other_adapted()(x))


def test_one_of_several_is_saved_by_its_name(model_of_two, folder, x):
    save_adapter(model_of_two, folder, adapter_name="other")
    fresh = load_adapter(Model(), folder)
    assert layers(fresh)["up"].active_adapters == ["default"]
    assert torch.equal(fresh(x), other_adapted()(x))


def of_different_options(second_name):
    """An adapter in one layer, and one with other options in another."""
    model = apply_randlora(Model().double(), ["down"], r=3, density=0.9, basis="independent")
    return randomize(apply_randlora(model, ["up"], r=4, seed=8, adapter_name=second_name))


def test_an_adapter_has_one_set_of_options(folder):
    """As the folder has; what has others is an adapter of its own."""
    with pytest.raises(ValueError, match="'default' has .*'r': 4.*'r': 3|'r': 3.*'r': 4.*other na"):
        save_adapter(of_different_options("default"), folder)
    assert not folder.exists()


def test_adapters_of_different_layers(folder, x):
    model, loaded = of_different_options("two"), Model().double()
    for name in ("default", "two"):
        save_adapter(model, folder, name)
        load_adapter(loaded, folder, name)
    assert torch.equal(loaded(x.double()), model(x.double()))
    assert loaded.tied is loaded.block["up"].base_layer


# ---- modules_to_save -----------------------------------------------------------------------------

SAVED_WHOLE = {"0.block.norm.weight", "0.block.norm.bias", "1.weight", "1.bias"}


@pytest.fixture
def headed():
    """A trained model with modules_to_save."""
    model = randomize(with_head())
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


@pytest.fixture
def headed_loaded(headed, folder):
    save_adapter(headed, folder)
    return load_adapter(nn.Sequential(Model(), nn.Linear(16, 3)), folder)


def test_modules_to_save_are_in_the_file_beside_the_adapter(headed, folder):
    save_adapter(headed, folder)
    parts = "lambda", "gamma", "input_scale"
    of_adapter = {f"0.{path}.randlora_{part}" for path in ("up", "block.up") for part in parts}
    assert names_in(folder) == SAVED_WHOLE | of_adapter
    assert config_in(folder)["modules_to_save"] == ["0.block.norm", "1"]


def test_modules_to_save_come_back(headed, headed_loaded, x):
    torch.testing.assert_close(headed_loaded(x), headed(x))


def test_modules_to_save_are_trained_after_loading(headed_loaded):
    trained = {name for name, p in headed_loaded.named_parameters() if p.requires_grad}
    assert {name for name in trained if "randlora_" not in name} == SAVED_WHOLE


def test_what_was_loaded_is_saved_as_the_same_bytes(headed_loaded, folder):
    again = folder.with_name("again")
    save_adapter(headed_loaded, again)
    for name in (CONFIG, WEIGHTS):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
