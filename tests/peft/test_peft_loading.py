"""randlora_ext.peft: `load_adapter` beside and over an adapter, and PEFT's other ways to load."""

import pytest
import torch
from peft_helpers import (
    Deep,
    Headed,
    accelerated,
    assert_unchanged,
    config,
    layers,
    made,
    numbers,
    opened,
    pair,
    peft,
    relative,
    shake,
    stock_made,
)
from safetensors.torch import load_file
from torch import nn

from randlora_ext import RandLoraLinear

pytestmark = pytest.mark.filterwarnings("ignore:RandLoRA layers multiply by dense")

TENSORS = "adapter_model.safetensors"
KEY_ALONE = {"sparse": True, "save_projection": False}
SEED = {"basis": "independent", "density": 0.2, "projection_prng_key": 7}
HADAMARD = {"basis": "hadamard", "projection_prng_key": 7}
DRAWN = {"density": 0.1, "save_projection": False}


def load(model, folder):
    model.load_adapter(folder, "default")


# ---- over an adapter -----------------------------------------------------------------------------

OTHER_BASES = {
    "density": (DRAWN, DRAWN | {"density": 0.2}),
    "seed of signs": (HADAMARD, HADAMARD | {"projection_prng_key": 8}),
    "kind of a seed": (HADAMARD, SEED),
}
MISFIT = r"(?s)projection_prng_key of the tensors.*randlora_alpha of the tensors is 99, not 640"


@pytest.mark.parametrize("own,other", OTHER_BASES.values(), ids=OTHER_BASES)
def test_other_bases_are_refused_and_nothing_changes(tmp_path, own, other):
    made(seed=3, randlora_alpha=99, **other).save_pretrained(tmp_path)
    model = made(**own)
    before = numbers(model)
    with pytest.raises(RuntimeError, match=MISFIT):
        load(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("own,other", OTHER_BASES.values(), ids=OTHER_BASES)
def test_a_configuration_of_other_bases_than_the_file_s_is_refused(tmp_path, own, other):
    made(seed=3, randlora_alpha=99, **other).save_pretrained(tmp_path)
    chosen = config(cls=accelerated.RandLoraConfig, **({"r": 5} | own))
    with pytest.raises(RuntimeError, match=MISFIT):
        opened(tmp_path, config=chosen)


SAME = {
    "seed without a density": ({"basis": "independent"}, {"density": 1 / 3}),
    "hadamard": (HADAMARD, HADAMARD),
    "uniform, saved": ({}, {}),
    "bases in the file": ({"sparse": True}, {"sparse": True, "projection_prng_key": 9}),
    "other kind of bases in the file": ({"sparse": True}, {"very_sparse": True}),
}


HEAD = {"modules_to_save": ["head"], "base": Headed}


class Replaced:
    """A model before and after its adapter was replaced by that of another, which was saved."""

    def __init__(self, own, other, folder):
        self.theirs = made(seed=3, randlora_alpha=99, **HEAD, **other).eval()
        shake(self.theirs)
        self.theirs.save_pretrained(folder)
        self.model = made(randlora_alpha=99, **HEAD, **own).eval()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.places = [parameter.data_ptr() for parameter in self.model.parameters()]
        load(self.model, folder)


@pytest.fixture(params=SAME)
def replaced(request, tmp_path):
    return Replaced(*SAME[request.param], tmp_path)


def test_a_replaced_adapter_computes_what_the_saved_one_did(replaced, x):
    assert torch.equal(replaced.model(x), replaced.theirs(x))


def test_parameters_stay_in_their_places(replaced):
    assert [p.data_ptr() for p in replaced.model.parameters()] == replaced.places


def test_an_optimizer_goes_on_with_a_replaced_adapter(replaced, x):
    replaced.model(x).square().sum().backward()
    replaced.optimizer.step()  # on the parameters that it was given
    assert relative(replaced.model(x), replaced.theirs(x)) > 1e-3


def test_a_replaced_adapter_is_saved_with_the_scaling_of_the_file(replaced, tmp_path, x):
    replaced.model.save_pretrained(tmp_path / "again")
    assert torch.equal(opened(tmp_path / "again", Headed)(x), replaced.theirs(x))


def test_load_adapter_on_bases_of_peft_keeps_alpha_as_stock_does(tmp_path, x):
    stock_made(seed=3, randlora_alpha=99, **KEY_ALONE).save_pretrained(tmp_path)
    stock, ours = pair(Deep(), lambda: config(5, **KEY_ALONE))
    stock.load_adapter(tmp_path, "default")
    ours.load_adapter(tmp_path, "default")
    assert layers(ours)[0].scaling["default"] == 640 / 5
    assert relative(ours(x), stock(x)) < 1e-6


@pytest.fixture
def without_configuration(tmp_path):
    """(the saved model, the folder above its own)"""
    theirs = made(seed=3, **HADAMARD)
    theirs.save_pretrained(tmp_path / "sub" / "folder")
    (tmp_path / "sub/folder/adapter_config.json").unlink()
    return theirs, tmp_path / "sub"


def test_tensors_without_a_configuration_are_loaded_over_an_adapter(without_configuration, x):
    """As stock PEFT does, if they say that they fit."""
    theirs, folder = without_configuration
    model = made(**HADAMARD)
    model.load_adapter(folder, "default", subfolder="folder")
    assert torch.equal(model(x), theirs(x))


def test_tensors_of_other_bases_are_refused_without_a_configuration(without_configuration):
    _, folder = without_configuration
    other = made(**HADAMARD | {"projection_prng_key": 9})
    with pytest.raises(RuntimeError, match="seed=7', not .*seed=9'"):
        other.load_adapter(folder, "default", subfolder="folder")


# ---- merged layers -------------------------------------------------------------------------------


DOORS = {
    "load_adapter": load,
    "set_peft_model_state_dict": lambda model, folder: peft.set_peft_model_state_dict(
        model.base_model.model, load_file(folder / TENSORS)
    ),
    "load_state_dict": lambda model, _: model.load_state_dict(model.state_dict()),
}


@pytest.fixture
def merged(tmp_path):
    """A merged model; the folder has another adapter."""
    made(seed=3, sparse=True).save_pretrained(tmp_path)
    model = made(sparse=True)
    model.merge_adapter()
    return model


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_nothing_is_loaded_into_a_merged_layer(tmp_path, merged, door, x):
    """Unmerging would take another adapter out of the weight than is in it."""
    unmerged = made(sparse=True)
    with pytest.raises(RuntimeError, match=r"\ba has merged \['default'\] into"):
        door(merged, tmp_path)
    assert relative(merged(x), unmerged(x)) < 1e-5
    merged.unmerge_adapter()
    assert torch.equal(merged(x), unmerged(x))


def test_another_adapter_is_loaded_beside_a_merged_one(tmp_path, merged, x):
    merged.load_adapter(tmp_path, "two")
    unmerged = made(sparse=True)
    merged.unmerge_adapter()
    for layer, other in zip(layers(merged), layers(unmerged), strict=True):
        assert torch.equal(layer.weight, other.weight)
    assert torch.equal(merged(x), unmerged(x))


# ---- beside stock PEFT, other methods and layers of ours -----------------------------------------


def test_a_stock_model_loads_as_ever(tmp_path, x):
    """With our methods in force."""
    stock = stock_made(**KEY_ALONE)
    theirs = made(seed=3, **KEY_ALONE, projection_prng_key=9)
    theirs.save_pretrained(tmp_path)
    stock.load_adapter(tmp_path, "default")
    for mine, saved in zip(layers(stock), layers(theirs), strict=True):
        for part in ("randlora_lambda", "randlora_gamma"):
            assert torch.equal(getattr(mine, part)["default"], getattr(saved, part)["default"])


@pytest.fixture
def lora(tmp_path):
    accelerated.enable()
    model = peft.get_peft_model(Deep(), peft.LoraConfig(r=3, target_modules=["a"]))
    model.save_pretrained(tmp_path)
    return model


def test_lora_loads_as_ever(tmp_path, lora, x):
    before = lora(x)
    lora.load_adapter(tmp_path, "default")
    assert torch.equal(lora(x), before)


@pytest.mark.parametrize("config_class", [peft.PeftConfig, peft.LoraConfig])
def test_configurations_of_lora_are_read_as_ever(tmp_path, lora, config_class):
    assert config_class.from_pretrained(pretrained_model_name_or_path=str(tmp_path)).r == 3


def test_an_injected_model_is_loaded_as_a_whole_or_not_at_all():
    """There is no PeftModel."""
    accelerated.enable()
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    peft.inject_adapter_in_model(config(4, targets=["1", "2"], sparse=True), model)
    saved = {key: value + 5 for key, value in peft.get_peft_model_state_dict(model).items()}
    saved["2.randlora_gamma"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"2\.randlora_gamma\.default is \(3, 3\)"):
        peft.set_peft_model_state_dict(model, saved)
    assert not model[1].randlora_lambda["default"].any()


@pytest.mark.parametrize("target", ["base_layer", "1"])
def test_a_model_with_adapters_without_peft_is_refused(target):
    accelerated.enable()
    model = nn.Sequential(RandLoraLinear(nn.Linear(24, 24), r=4), nn.Linear(24, 24))
    with pytest.raises(ValueError, match="module '0' is a RandLoraLinear: adapt all layers by PE"):
        peft.get_peft_model(model, config(4, targets=[target], sparse=True))
    assert type(model[0].base_layer) is type(model[1]) is nn.Linear


def test_a_second_adapter_that_targets_base_layers_is_not_nested_in_the_first():
    accelerated.enable()
    model = peft.get_peft_model(nn.Sequential(nn.Linear(24, 24)), config(4, targets=["0"]))
    model.add_adapter("two", config(4, targets=["0", "base_layer"]))
    (layer,) = layers(model)
    assert list(layer.randlora_lambda) == ["default", "two"]
