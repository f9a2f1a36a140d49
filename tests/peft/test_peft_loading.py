"""randlora_ext.peft: a file over an adapter that is there (`load_adapter`, `hotswap_adapter`)."""

import contextlib
import math

import pytest
import torch
from cli_helpers import llama
from peft_helpers import (
    PEFT,
    Deep,
    Headed,
    accelerated,
    adapted,
    assert_unchanged,
    config,
    edit,
    layers,
    made,
    numbers,
    opened,
    pair,
    peft,
    randomize,
    relative,
    stock_made,
)
from safetensors.torch import load_file, save_file
from torch import nn

import randlora_ext

pytestmark = pytest.mark.filterwarnings("ignore:RandLoRA layers multiply by dense")

TENSORS = "adapter_model.safetensors"
KEY_ALONE = {"sparse": True, "save_projection": False}
SEED = {"basis": "independent", "density": 0.2, "projection_prng_key": 7}
HADAMARD = {"basis": "hadamard", "projection_prng_key": 7}
DRAWN = {"density": 0.1, "save_projection": False}
VERY_SPARSE = {"very_sparse": True, "save_projection": False}


def load(model, folder):
    model.load_adapter(folder, "default")


@contextlib.contextmanager
def edited(folder):
    """The tensors, which are written back."""
    file = folder / TENSORS
    yield (state := load_file(file))
    save_file(state, file)


MISFITS = {
    "key": (KEY_ALONE, KEY_ALONE | {"projection_prng_key": 9}, "sparse, .*_key=9, not .*_key=0$"),
    "flags": (KEY_ALONE, VERY_SPARSE, "PEFT's, very_sparse, of .*, not PEFT's, sparse, of"),
    "uniform": (KEY_ALONE, {"save_projection": False}, "uniform, of .*, not PEFT's, sparse"),
    "density": (DRAWN, DRAWN | {"density": 0.2}, r"density=0\.2:.*, not .*density=0\.1:seed=0$"),
    "seed of signs": (HADAMARD, HADAMARD | {"projection_prng_key": 8}, "seed=8, not .*seed=7$"),
    "kind of a seed": (HADAMARD, SEED, r"independent-1:density=0\.2:seed=7, not .*hadamard-1:"),
}


@pytest.mark.parametrize("own,other,message", MISFITS.values(), ids=MISFITS)
def test_other_bases_are_named_and_nothing_changes(tmp_path, own, other, message):
    made(seed=3, randlora_alpha=99, **other).save_pretrained(tmp_path)
    model = made(**own)
    before = numbers(model)
    with pytest.raises(ValueError, match=rf"(?s)does not fit 'default'.*:\n\t.*{message}"):
        accelerated.hotswap_adapter(model, tmp_path)
    assert_unchanged(model, before)
    if own is KEY_ALONE:
        return  # such files are stock PEFT's, and load as there
    told = r"(?s)projection_prng_key of the tensors.*randlora_alpha of the tensors is 99, not 640"
    with pytest.raises(RuntimeError, match=told):
        load(model, tmp_path)
    assert_unchanged(model, before)
    # also if the adapter is made of another configuration than the file's
    chosen = config(cls=accelerated.RandLoraConfig, **({"r": 5} | own))
    with pytest.raises(RuntimeError, match=told):
        opened(tmp_path, config=chosen)


SAME = {
    "seed without a density": ({"basis": "independent"}, {"density": 1 / 3}),
    "hadamard": (HADAMARD, HADAMARD),
    "uniform, saved": ({}, {}),
    "bases in the file": ({"sparse": True}, {"sparse": True, "projection_prng_key": 9}),
    "other kind of bases in the file": ({"sparse": True}, {"very_sparse": True}),
}


@pytest.mark.parametrize("own,other", SAME.values(), ids=SAME)
def test_the_same_or_saved_bases_load_in_place(tmp_path, own, other, x):
    head = {"modules_to_save": ["head"], "base": Headed}
    theirs = made(seed=3, randlora_alpha=99, **head, **other).eval()
    with torch.no_grad():
        theirs.base_model.model.head.modules_to_save["default"].weight.add_(1)
    theirs.save_pretrained(tmp_path)
    for replace in (load, accelerated.hotswap_adapter):
        model = made(randlora_alpha=99 if replace is load else 640, **head, **own).eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        places = [parameter.data_ptr() for parameter in model.parameters()]
        replace(model, tmp_path)
        assert [parameter.data_ptr() for parameter in model.parameters()] == places
        assert torch.equal(model(x), theirs(x))
    model.save_pretrained(tmp_path / "again")  # with the file's scaling
    assert torch.equal(opened(tmp_path / "again", Headed)(x), theirs(x))
    model(x).square().sum().backward()
    optimizer.step()  # on the parameters that it was given
    assert relative(model(x), theirs(x)) > 1e-3


def test_load_adapter_on_bases_of_peft_keeps_alpha_as_stock_does(tmp_path, x):
    stock_made(seed=3, randlora_alpha=99, **KEY_ALONE).save_pretrained(tmp_path)
    stock, ours = pair(Deep(), lambda: config(5, **KEY_ALONE))
    stock.load_adapter(tmp_path, "default")
    ours.load_adapter(tmp_path, "default")
    assert layers(ours)[0].scaling["default"] == 640 / 5
    assert relative(ours(x), stock(x)) < 1e-6


def test_a_file_without_a_configuration(tmp_path, x):
    """Loading over an adapter takes its tensors, as stock PEFT does, if they say that they fit."""
    theirs = made(seed=3, **HADAMARD)
    theirs.save_pretrained(tmp_path / "sub" / "folder")
    (tmp_path / "sub/folder/adapter_config.json").unlink()
    model = made(**HADAMARD)
    model.load_adapter(tmp_path / "sub", "default", subfolder="folder")
    assert torch.equal(model(x), theirs(x))
    other = made(**HADAMARD | {"projection_prng_key": 9})
    with pytest.raises(RuntimeError, match="seed=7', not .*seed=9'"):
        other.load_adapter(tmp_path / "sub", "default", subfolder="folder")
    with pytest.raises(OSError, match=r"sub/folder/adapter_config\.json"):
        accelerated.hotswap_adapter(model, tmp_path / "sub", subfolder="folder")
    with pytest.raises(ValueError, match="'HUB/NAME' is no folder here, and not on the hub: "):
        accelerated.hotswap_adapter(model, "HUB/NAME")


def test_a_model_that_was_accelerated_without_enable(tmp_path):
    """Stock PEFT's table is in force then, whose configuration drops the density."""
    made(seed=3, density=0.2, save_projection=False).save_pretrained(tmp_path)
    model = accelerated.accelerate(stock_made(save_projection=False))
    with pytest.raises(ValueError, match=r"density=0\.2:seed=0, not PEFT's, uniform"):
        accelerated.hotswap_adapter(model, tmp_path)


def test_other_methods_and_layers_pass_through(tmp_path):
    """With our methods in force stock PEFT's behaviour on stock models and on LoRA stays."""
    stock = stock_made(**KEY_ALONE)
    made(seed=3, **KEY_ALONE, projection_prng_key=9).save_pretrained(tmp_path)
    stock.load_adapter(tmp_path, "default")
    lora = peft.get_peft_model(Deep(), peft.LoraConfig(r=3, target_modules=["a"]))
    lora.save_pretrained(tmp_path)
    lora.load_adapter(tmp_path, "default")
    for kind in (peft.PeftConfig, peft.LoraConfig):
        assert kind.from_pretrained(pretrained_model_name_or_path=str(tmp_path)).r == 3


def test_hotswap_one_of_several_by_a_file_of_stock(tmp_path, x):
    stock = stock_made(seed=3, sparse=True)
    stock.save_pretrained(tmp_path)
    model = made(sparse=True)
    model.add_adapter("two", config(5, sparse=True))
    randomize(model, 4)
    before = model(x)
    accelerated.hotswap_adapter(model, tmp_path, "two")
    assert torch.equal(model(x), before)
    model.set_adapter("two")
    assert relative(model(x), stock(x)) < 1e-6


def test_hotswap_of_a_targeted_output_layer(tmp_path):
    """PEFT saves the base weight of a targeted lm_head with the adapter."""
    kind = {"targets": ["lm_head"], "basis": "hadamard"}
    first, second = (adapted(llama(num_hidden_layers=1), seed=s, **kind) for s in (1, 2))
    second.save_pretrained(tmp_path, save_embedding_layers=True)
    accelerated.hotswap_adapter(first, tmp_path)
    x = torch.arange(6).view(1, 6)
    assert torch.equal(first(x).logits, second(x).logits)


def refuses_to_swap(model, folder, message):
    before = numbers(model)
    with pytest.raises((TypeError, ValueError), match=message):
        accelerated.hotswap_adapter(model, folder)
    assert_unchanged(model, before)
    assert layers(model)[0].scaling["default"] == 640 / 5


def test_what_hotswap_asks_more_than_load_adapter(tmp_path):
    rank = r"r is 6, not 5\n\t.*a\.randlora_lambda is \(6, 4\), and must be "
    dropout = r"randlora_dropout is 0\.5, not 0\.0"
    for options, message in (({"r": 6}, rank), ({"randlora_dropout": 0.5}, dropout)):
        made(seed=3, **SEED, **options).save_pretrained(tmp_path)
        refuses_to_swap(made(**SEED), tmp_path, rf"(?s)does not fit 'default'.*:\n\t.*{message}")
    for alpha in ("64", None, True, 10**400, math.nan):
        edit(tmp_path / "adapter_config.json", randlora_alpha=alpha)
        refuses_to_swap(made(**SEED), tmp_path, "randlora_alpha must be a finite number, got ")
    head = {"base": Headed, "modules_to_save": ["head"]}
    made(**SEED, **head).save_pretrained(tmp_path)
    refuses_to_swap(made(**SEED), tmp_path, "head.* is not part")
    with edited(tmp_path) as state:
        state["base_model.model.head.weight"] = torch.ones(4, 40)
        state["base_model.model.c.randlora_gamma"] = torch.ones(5, 24, dtype=torch.int64)
    message = r"(?s)c.randlora_gamma is torch.int64, and must be flo"
    message += r".*head.weight is \(4, 40\), and must be \(3, 40\)"
    refuses_to_swap(made(seed=2, **SEED, **head), tmp_path, message)
    with edited(tmp_path) as state:
        del state["base_model.model.b.randlora_lambda"]
    message = f"{tmp_path}: base_model.model.b.randlora_lambda is missing"
    refuses_to_swap(made(seed=2, **SEED, **head), tmp_path, message)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refuses_to_swap(made(seed=2, **SEED, **head), tmp_path, f"{weights} is damaged")


def test_a_file_that_does_not_fit_leaves_nothing(tmp_path, x):
    head = {"base": Headed, "modules_to_save": ["head"]}
    made(seed=3, **SEED, **head).save_pretrained(tmp_path)
    with edited(tmp_path) as state:
        del state["base_model.model.head.bias"]
    model = made(**SEED, **head)
    before = numbers(model)
    for name in ("default", "two"):
        with pytest.raises(KeyError, match=r"model\.head\.bias"):  # PEFT's
            model.load_adapter(tmp_path, name)
    with edited(tmp_path) as state:
        state["base_model.model.head.bias"] = torch.ones(3)
        state["base_model.model.c.randlora_gamma"] = torch.ones(3, 24)
    for name in ("default", "two"):
        with pytest.raises(RuntimeError, match=f"c.randlora_gamma.{name} is"):
            model.load_adapter(tmp_path, name)
    model.delete_adapter("two")  # which PEFT has added before it reads the tensors
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"] and model.active_adapter == "default"


def test_what_cannot_be_swapped(tmp_path):
    model = made(sparse=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default'\], got 'two'"):
        accelerated.hotswap_adapter(model, tmp_path, "two")
    lora = peft.get_peft_model(Deep(), peft.LoraConfig(r=3, target_modules=["a"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="peft_type must be RANDLORA, got 'LORA'"):
        accelerated.hotswap_adapter(model, tmp_path / "lora")
    for other in (stock_made(sparse=True), Deep()):
        with pytest.raises(TypeError, match="needs a PeftModel on randlora_ext's layers, got "):
            accelerated.hotswap_adapter(other, tmp_path)


DOORS = {
    "load_adapter": load,
    "hotswap_adapter": accelerated.hotswap_adapter,
    "set_peft_model_state_dict": lambda model, folder: peft.set_peft_model_state_dict(
        model.base_model.model, load_file(folder / TENSORS)
    ),
    "load_state_dict": lambda model, _: model.load_state_dict(model.state_dict()),
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_nothing_is_loaded_into_a_merged_layer(tmp_path, door, x):
    """Unmerging would take another adapter out of the weight than is in it."""
    made(seed=3, sparse=True).save_pretrained(tmp_path)
    model = made(sparse=True)
    weights = [layer.weight.clone() for layer in layers(model)]
    before = model(x)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"\ba has merged \['default'\] into"):
        door(model, tmp_path)
    assert relative(model(x), before) < 1e-5
    model.load_adapter(tmp_path, "two")  # but another adapter can be loaded
    model.unmerge_adapter()
    for layer, weight in zip(layers(model), weights, strict=True):
        assert torch.equal(layer.weight, weight)
    assert torch.equal(model(x), before)


def blocks(count):
    made = (nn.ModuleDict({name: nn.Linear(24, 24) for name in "qv"}) for _ in range(count))
    return nn.Sequential(*made)


@pytest.mark.skipif(PEFT < (0, 21), reason="PEFT 0.20 has no hook where tensors are handed over")
@pytest.mark.parametrize("way", ["from_pretrained", "new", "over"])
def test_a_file_that_fits_in_part_is_told(tmp_path, recwarn, way):
    """Stock PEFT says nothing of tensors without a place, and little of those that are missing."""
    adapted(blocks(2), "q", sparse=True).save_pretrained(tmp_path)

    def load_into(count, targets="q"):
        if way == "from_pretrained":
            model = opened(tmp_path, lambda: blocks(count))
        else:
            model = adapted(blocks(count), targets, sparse=True)
            model.load_adapter(tmp_path, {"new": "two", "over": "default"}[way])
        said = [str(w.message) for w in recwarn if "only in part" in str(w.message)]
        recwarn.clear()
        return model, said

    assert load_into(2)[1] == []
    _, (message,) = load_into(1)
    assert "2 tensors have no place" in message
    assert "model.1.q.randlora_lambda" in message and "stay as they were" not in message
    model, (message,) = load_into(3)
    assert "2 tensors of the adapter are missing and stay as they were" in message
    assert "model.2.q.randlora_lambda" in message and "no place" not in message
    if way != "over":  # what no file has filled changes nothing
        name = "two" if way == "new" else "default"
        assert not model.base_model.model[2]["q"].randlora_lambda[name].any()
    if way == "over":
        _, (alone, missing) = load_into(2, "v")
        assert "4 tensors have no place" in alone and "4 tensors of the" in missing


@pytest.mark.parametrize("beside_ours", [False, True])
def test_an_injected_model_is_loaded_as_a_whole_or_not_at_all(beside_ours):
    """No PeftModel checks all layers first; unload() takes off our own layers, not that guard."""
    accelerated.enable()
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    if beside_ours:
        randlora_ext.apply_randlora(model, ["0"], r=2)
    peft.inject_adapter_in_model(config(4, targets=["1", "2"], sparse=True), model)
    if beside_ours:
        randlora_ext.unload(model)
    saved = {key: value + 5 for key, value in peft.get_peft_model_state_dict(model).items()}
    saved["2.randlora_gamma"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"2\.randlora_gamma\.default is \(3, 3\)"):
        peft.set_peft_model_state_dict(model, saved)
    assert not model[1].randlora_lambda["default"].any()


def test_adapters_of_peft_cannot_be_nested_in_ours():
    accelerated.enable()
    model = randlora_ext.apply_randlora(nn.Sequential(nn.Linear(24, 24)), ["0"], r=4)
    with pytest.raises(ValueError, match=r"target '0\.base_layer' lies inside '0'.*be nested"):
        peft.get_peft_model(model, config(4, targets=["base_layer"], sparse=True))
    assert type(model[0].base_layer) is nn.Linear
    over = peft.get_peft_model(nn.Sequential(nn.Linear(24, 24)), config(4, targets=["0"]))
    over.add_adapter("two", config(4, targets=["0", "base_layer"]))
    assert list(layers(over)[0].randlora_lambda) == ["default", "two"] and len(layers(over)) == 1
