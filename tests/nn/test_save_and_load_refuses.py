"""What `save_adapter` and `load_adapter` refuse, before anything changes."""

import copy
import os

import pytest
import torch
from layer_helpers import layers, randomize
from safetensors.torch import save_file
from saved_adapters import (
    CONFIG,
    OPTIONS,
    WEIGHTS,
    Model,
    adapted,
    edit_config,
    tensors_in,
    two_squares,
    with_head,
)
from torch import nn

from randlora_ext import (
    RandLoraLinear,
    apply_randlora,
    load_adapter,
    merge_and_unload,
    save_adapter,
)
from randlora_ext.nn.adapter_record import RECORD_KEY


def replaced(path, module):
    model = Model()
    model.set_submodule(path, module)
    return model


def nested():
    holder = nn.ModuleDict({"base_layer": nn.Linear(24, 40)})
    return apply_randlora(nn.Sequential(holder), ["base_layer"], r=4)


MISFITS = {
    "wider": (
        adapted, lambda: Model(hidden=32),
        r"up is of in_features and out_features \(16, 24\), and must be of \(16, 32\)",
    ),
    "tied": (
        lambda: randomize(apply_randlora(two_squares(), ["0", "1"], r=2)),
        lambda: nn.Sequential(*[nn.Linear(8, 8)] * 2),
        "1: it is tied to 0, whose tensors differ",
    ),
    "not linear": (
        adapted, lambda: replaced("block.up", nn.Conv1d(16, 16, 1)),
        "module 'block.up' of the adapter must be an nn.Linear",
    ),
    "gone": (adapted, two_squares, "block.up: there is no such module"),
    "taken": (adapted, adapted, "up: it has an adapter 'default' already"),
    "meta": (adapted, lambda: Model().to("meta"), "not whole here"),
    "some layers": (
        adapted, lambda: apply_randlora(Model(), "down", **OPTIONS, adapter_name="first"),
        "block.up: .*it has no adapter and other layers of the file have",
    ),
    "nested": (
        nested, lambda: apply_randlora(nn.Sequential(nn.Linear(24, 40)), ["0"], adapter_name="a"),
        r"'0\.base_layer' of the adapter lies inside '0'.*nested",
    ),
    "no head": (with_head, lambda: nn.Sequential(Model()), r"1\.bias: there is no such parameter"),
    "wider head": (
        with_head, lambda: nn.Sequential(Model(), nn.Linear(16, 4)),
        r"1\.bias is \(3,\), and must be \(4,\)",
    ),
    "a head in use": (
        with_head, lambda: with_head(adapter_name="first"), "the model's other adapters use it, too"
    ),
}  # fmt: skip


def described(model):
    """What loading could change beside numbers: modules, and which parameters are trained."""
    modules = [type(module) for module in model.modules()]
    return modules, [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize("case", MISFITS)
def test_a_model_that_does_not_fit(folder, case):
    saved, make, message = MISFITS[case]
    save_adapter(saved(), folder)
    model = make()
    before, description = copy.deepcopy(model.state_dict()), described(model)
    with pytest.raises(TypeError if case == "not linear" else ValueError, match=message):
        load_adapter(model, folder)
    assert described(model) == description
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert case == "meta" or all(torch.equal(after[key], before[key]) for key in before)


def test_a_model_that_is_a_bare_layer_cannot_be_replaced(folder):
    save_adapter(RandLoraLinear(nn.Linear(8, 12), r=3), folder)
    with pytest.raises(ValueError, match="cannot be replaced"):
        load_adapter(nn.Linear(8, 12), folder)


UNSAVED = {
    "no adapter": (Model, "model has no adapter: apply_randlora and load_adapter make them"),
    "merged": (lambda: merge_and_unload(adapted()), "merge_and_unload and unload take them away"),
    "meta": (lambda: adapted().to("meta"), "randlora_lambda has no numbers here"),
}


@pytest.mark.parametrize("case", UNSAVED)
def test_what_has_no_adapter_is_not_saved(folder, case):
    make, message = UNSAVED[case]
    with pytest.raises(ValueError, match=message):
        save_adapter(make(), folder)
    assert not folder.exists()


def test_an_adapter_that_does_not_exist_is_not_saved(folder):
    with pytest.raises(ValueError, match=r"^adapter_name must be one of \['default'\], got 'x'"):
        save_adapter(adapted(), folder, adapter_name="x")
    assert not folder.exists()


FIELDS = {
    "r": ({"r": 6}, "r of the tensors is 5, not 6"),
    "r huge": ({"r": 2**62 + 1}, "\\[1, 65536\\]"),
    "alpha": ({"randlora_alpha": 10}, "randlora_alpha of the tensors is 9, not 10"),
    "alpha no number": ({"randlora_alpha": float("nan")}, "randlora_alpha must be a finite"),
    "dropout": ({"randlora_dropout": 1}, "randlora_dropout must be a number in .0, 1"),
    "a list": ({"randlora_dropout": [0]}, "randlora_dropout must be a number in .0, 1"),
    "key": ({"projection_prng_key": "randlora_ext:hadamard-1:seed=1", "density": None,
             "basis": "hadamard"}, "projection_prng_key of the tensors is"),
    "another version": ({"projection_prng_key": "randlora_ext:hadamard-2:seed=1"}, "no key of a"),
    "basis": ({"basis": "hadamard"}, "contradicts basis='hadamard'"),
    "type": ({"peft_type": "LORA"}, "peft_type must be RANDLORA, got 'LORA'"),
    "type a list": ({"peft_type": ["RANDLORA"]}, "peft_type must be RANDLORA, got .'RANDLORA'"),
    "flag": ({"save_projection": 1}, "save_projection must be True or False, got 1"),
    "modules a text": ({"modules_to_save": "up"}, "modules_to_save must be a list of texts or N"),
    "a number": ({"target_parameters": [1]}, "target_parameters must be a list of texts or None"),
    "modules": ({"modules_to_save": ["norm"]}, "lacks block.norm.weight, though modules_to_save"),
    "of PEFT": ({"projection_prng_key": 0, "basis": "peft", "density": None, "peft_type":
                 "RANDLORA"}, "PEFT draws the bases of this adapter; peft.PeftModel.from_pret"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_a_configuration_that_is_wrong(folder, case):
    fields, message = FIELDS[case]
    save_adapter(adapted(), folder)
    edit_config(folder, **fields)
    model = Model()
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, folder)
    assert str(folder) in str(caught.value) and not layers(model)


NO_CONFIGURATIONS = {
    "cut off": (b"{", "Expecting property name"),
    "no object": (b"1", "must hold a JSON object, got int"),
    "deep": (b"[" * 100_000, "recursion"),
    "no text": (b"\x00\xff", "(decode|Expecting)"),
}


@pytest.mark.parametrize("case", NO_CONFIGURATIONS)
def test_a_configuration_that_is_none(folder, case):
    contents, message = NO_CONFIGURATIONS[case]
    save_adapter(adapted(), folder)
    (folder / CONFIG).write_bytes(contents)
    with pytest.raises(ValueError, match=f"^{folder / CONFIG}: .*{message}"):
        load_adapter(Model(), folder)


def without(key):
    return lambda tensors: tensors.pop(f"base_model.model.{key}")


def replacing(key, tensor):
    return lambda tensors: tensors.update({f"base_model.model.{key}": tensor})


CHANGES = {
    "no lambda": (without("up.randlora_lambda"), "up.randlora_lambda is missing"),
    "no gamma": (without("up.randlora_gamma"), "up.randlora_gamma is missing"),
    "no record": (without(f"up.{RECORD_KEY}"), f"up.{RECORD_KEY} is missing"),
    "no scale": (without("up.randlora_input_scale"), "up.randlora_input_scale is missing: "),
    "a negative scale": (
        replacing("up.randlora_input_scale", -torch.ones(16)), "scale must be positive and finite"
    ),
    "a scale too long": (
        replacing("up.randlora_input_scale", torch.ones(24)), r"\(24,\), and must be \(16,\)"
    ),
    "integers": (
        replacing("up.randlora_lambda", torch.ones(5, 4).byte()), "must be floating point"
    ),
    "another shape": (
        replacing("up.randlora_lambda", torch.ones(5, 5)), r"\(5, 5\), and must be \(5, 4\)"
    ),
    "experts": (
        replacing("up.randlora_lambda", torch.ones(2, 5, 4)), "target_parameters .* name .. of them"
    ),
    "of a layer": (replacing("up.weight", torch.ones(24, 16)), "it has up.weight, which an adapt"),
    "more": (replacing("other.weight", torch.ones(1)), "other.weight: there is no such parameter"),
    "a tied layer": (
        replacing("tied.randlora_input_scale", torch.full((16,), 2.0)),
        "tied: it is tied to block.up, whose tensors differ",
    ),
    "nothing": (lambda tensors: tensors.clear(), "it holds no randlora_lambda"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_tensors_that_are_wrong(folder, case):
    change, message = CHANGES[case]
    save_adapter(adapted(basis="hadamard", density=None), folder)
    tensors, model = tensors_in(folder), Model()
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, folder)
    assert str(folder) in str(caught.value) and not layers(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_file_that_is_cut_off(folder):
    save_adapter(adapted(), folder)
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{weights} is damaged"):
        load_adapter(Model(), folder)


def test_a_pickle_is_not_opened(folder):
    save_adapter(adapted(), folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=f"{folder}/adapter_model.bin is a pickle: open it"):
        load_adapter(Model(), folder)


def test_a_name_on_the_hub(folder):
    with pytest.raises(FileNotFoundError, match="^HUB/NAME does not exist here; of the hub's, `hf"):
        load_adapter(Model(), "HUB/NAME")


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/{CONFIG}"):
        load_adapter(Model(), tmp_path)


def test_a_file_in_the_place_of_a_folder(folder):
    save_adapter(adapted(), folder)
    with pytest.raises(NotADirectoryError, match=f"{folder / CONFIG} is a file; an adapter is a"):
        load_adapter(Model(), folder / CONFIG)


UNWRITABLE = {
    "empty": lambda folder: "",
    "root": lambda folder: "/",
    "below a file": lambda folder: folder / CONFIG / "below",
    "too long": lambda folder: folder.with_name("n" * 256),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written(folder, case):
    save_adapter(adapted(), folder)
    before = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    path = UNWRITABLE[case](folder)
    with pytest.raises(OSError, match=f"^{path or repr('')} cannot be written: ") as caught:
        save_adapter(adapted(), path)
    assert ".randlora" not in str(caught.value)  # where it writes first
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert os.listdir(folder.parent) == [folder.name] and len(os.listdir(folder)) == 2
