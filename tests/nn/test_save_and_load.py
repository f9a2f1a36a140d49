"""`save_adapter` and `load_adapter`: what they keep, and what they refuse before a change."""

import copy
import json
import os

import pytest
import torch
from layer_helpers import layers, make_base, randomize
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from randlora_ext import (
    RandLoraLinear,
    apply_randlora,
    load_adapter,
    merge_and_unload,
    save_adapter,
)
from randlora_ext.nn.adapter_record import RECORD_KEY, read_record

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

OPTIONS = {"r": 5, "randlora_alpha": 9, "density": 0.3, "seed": 2**63 + 5, "basis": "independent"}


class Model(nn.Module):
    """Wide, tall, square; one layer under two names."""

    def __init__(self, hidden=24):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, hidden), nn.Linear(hidden, 16)
        self.block = nn.ModuleDict({"up": nn.Linear(16, 16), "norm": nn.LayerNorm(16)})
        self.block["spare"] = nn.Linear(4, 4)
        self.tied = self.block["up"]

    def forward(self, x):
        return self.block["norm"](self.tied(self.down(self.up(x)) + self.block["up"](x)))


def adapted(numbers=1, **options):
    return randomize(
        apply_randlora(Model(), ["up", "down", "tied"], **(OPTIONS | options)), numbers
    )


def with_head(**options):
    model = nn.Sequential(Model(), torch.compile(nn.Linear(16, 3)))
    return apply_randlora(model, ["up"], modules_to_save=["norm", "1"], r=2, **options)


def two_squares():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


@pytest.fixture
def x():
    return torch.randn(7, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "adapter"


def tensors_in(folder):
    return load_file(folder / WEIGHTS)


def config_in(folder):
    return json.loads((folder / CONFIG).read_text())


def edit(folder, **fields):
    (folder / CONFIG).write_text(json.dumps(config_in(folder) | fields))


def paths_of(keys):
    """The tensors that are no records, without PEFT's prefix."""
    names = {key.removeprefix("base_model.model.") for key in keys}
    return {name for name in names if not name.endswith(RECORD_KEY)}


def test_a_round_trip_onto_the_base_model(folder, x):
    model = adapted(randlora_dropout=0.25)
    save_adapter(model, folder)
    base = Model()
    assert load_adapter(base, folder) is base
    assert base.tied is base.block["up"]
    for name, layer in layers(model).items():
        other = layers(base)[name]
        assert other.extra_repr() == layer.extra_repr() and other.scaling == layer.scaling
        assert other.bases == layer.bases and other.randlora_dropout["default"].p == 0.25
    trained = [n for n, p in base.named_parameters() if p.requires_grad]
    assert trained == [n for n, p in model.named_parameters() if p.requires_grad]
    assert torch.equal(base.eval()(x), model.eval()(x))
    assert base.state_dict().keys() == model.state_dict().keys()
    assert os.listdir(folder.parent) == [folder.name]


def test_the_folder_says_what_it_belongs_to(folder):
    save_adapter(adapted(), folder)
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    paths, kinds = ("up", "down", "block.up", "tied"), ("lambda", "gamma")
    own = {f"{at}.randlora_{kind}" for at in paths for kind in kinds}
    assert paths_of(tensors_in(folder)) == own
    basis = f"randlora_ext:independent-1:density=0.3:seed={2**63 + 5}"
    about = {"projection_prng_key": basis, "r": 5, "randlora_alpha": 9, "target_parameters": []}
    for at in paths:
        key = f"base_model.model.{at}.{RECORD_KEY}"
        sizes = {"up": (16, 24), "down": (24, 16)}.get(at, (16, 16))
        record = about | dict(zip(("in_features", "out_features"), sizes, strict=True))
        assert read_record(key, tensors_in(folder)[key]) == record
    fields = config_in(folder)
    assert fields.items() >= {
        "projection_prng_key": basis, "r": 5, "randlora_alpha": 9, "randlora_dropout": 0.0,
        "basis": "independent", "density": 0.3, "save_projection": False, "bias": "none",
        "target_parameters": None, "modules_to_save": None, "fan_in_fan_out": False,
    }.items()  # fmt: skip
    assert fields["target_modules"] == ["down", "tied", "up"]
    assert fields["peft_type"].startswith("RANDLORA; needs randlora_ext: import")


@pytest.mark.parametrize("alpha", [9, 0.7, 1e-3, 640, -20, 0, 1 / 3, 123456789.1])
@pytest.mark.parametrize("r", [3, 7, 30, 32])
def test_the_scaling_comes_back_bit_for_bit(folder, alpha, r):
    model = apply_randlora(Model(), ["down"], r=r, randlora_alpha=alpha)
    save_adapter(model, folder)
    assert layers(load_adapter(Model(), folder))["down"].scaling == layers(model)["down"].scaling


TARGETS = {
    "last names": (["up", "down", "tied"], ["down", "tied", "up"]),
    "a name that others have": (["block.up", "down"], r"down|block\.up"),
}


@pytest.mark.parametrize("targets, told", TARGETS.values(), ids=TARGETS)
def test_target_modules_match_the_layers_and_no_others(folder, targets, told):
    """As PEFT matches them."""
    model = apply_randlora(Model(), targets, r=2)
    save_adapter(model, folder)
    assert config_in(folder)["target_modules"] == told


def test_several_adapters(folder, x):
    model = adapted()
    alone = model(x)
    save_adapter(adapted(numbers=2, r=3, density=0.7), folder)
    load_adapter(model, folder, adapter_name="other")
    assert torch.equal(model(x), alone)  # not active
    assert not any(layer.randlora_lambda["other"].requires_grad for layer in layers(model).values())
    for layer in layers(model).values():
        layer.set_adapter("other")
    assert torch.equal(model(x), adapted(numbers=2, r=3, density=0.7)(x))
    save_adapter(model, folder, adapter_name="other")
    fresh = load_adapter(Model(), folder)
    assert layers(fresh)["up"].active_adapters == ["default"] and torch.equal(fresh(x), model(x))


def test_adapters_of_different_layers(folder, x):
    """One folder has one set of options; what has others is an adapter of its own."""

    def made(second):
        model = apply_randlora(Model().double(), ["down"], r=3, density=0.9, basis="independent")
        return randomize(apply_randlora(model, ["up"], r=4, seed=8, adapter_name=second))

    with pytest.raises(ValueError, match="'default' has .*'r': 4.*'r': 3|'r': 3.*'r': 4.*other na"):
        save_adapter(made("default"), folder)
    assert not folder.exists()
    model, loaded = made("two"), Model().double()
    for name in ("default", "two"):
        save_adapter(model, folder, name)
        load_adapter(loaded, folder, name)
    assert torch.equal(loaded(x.double()), model(x.double()))
    assert loaded.tied is loaded.block["up"].base_layer


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_one_layer(folder, kind):
    layer = randomize(RandLoraLinear(make_base(8, 12, kind), r=3))
    save_adapter(torch.compile(layer), folder)
    other = RandLoraLinear(make_base(8, 12, kind), r=3)
    load_adapter(other, folder, "two")
    other.set_adapter("two")
    assert torch.equal(other(torch.ones(8)), layer(torch.ones(8)))
    with pytest.raises(ValueError, match="cannot be replaced"):
        load_adapter(nn.Linear(8, 12), folder)


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_a_layer_that_is_wrapped_alone(folder, wrap):
    """The folder does not name the wrapper."""
    model = randomize(apply_randlora(two_squares(), ["0", "1"], r=2))
    base = nn.Sequential(*(copy.deepcopy(layer.base_layer) for layer in model))
    want = model(x := torch.randn(3, 8))
    model[0] = wrap(model[0])
    save_adapter(model, folder)
    assert torch.equal(load_adapter(base, folder)(x), want)


def test_modules_to_save_go_along(folder, x):
    model = randomize(with_head())
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    save_adapter(model, folder)
    parameters = {"0.block.norm.weight", "0.block.norm.bias", "1.weight", "1.bias"}
    kinds = "lambda", "gamma", "input_scale"
    own = {f"0.{path}.randlora_{kind}" for path in ("up", "block.up") for kind in kinds}
    assert paths_of(tensors_in(folder)) == parameters | own
    assert config_in(folder)["modules_to_save"] == ["0.block.norm", "1"]
    loaded = load_adapter(nn.Sequential(Model(), nn.Linear(16, 3)), folder)
    torch.testing.assert_close(loaded(x), model(x))
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad and "rand" not in n}
    assert trained == parameters
    again = folder.with_name("again")
    save_adapter(loaded, again)
    for name in (CONFIG, WEIGHTS):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


# ---- what is refused, before anything changes ---------------------------------------------------


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


@pytest.mark.parametrize("case", MISFITS)
def test_a_model_that_does_not_fit(folder, case):
    saved, make, message = MISFITS[case]
    save_adapter(saved(), folder)
    model = make()
    before, modules = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TypeError if case == "not linear" else ValueError, match=message):
        load_adapter(model, folder)
    assert [type(m) for m in model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == trained
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert case == "meta" or all(torch.equal(after[key], before[key]) for key in before)


def test_what_has_no_adapter_is_not_saved(folder):
    for model, name, told in (
        (Model(), "default", "model has no adapter: apply_randlora and load_adapter make them"),
        (merge_and_unload(adapted()), "default", "merge_and_unload and unload take them away"),
        (adapted(), "x", r"^adapter_name must be one of \['default'\], got 'x'"),
        (adapted().to("meta"), "default", "randlora_lambda has no numbers here"),
    ):
        with pytest.raises(ValueError, match=told):
            save_adapter(model, folder, adapter_name=name)
        assert not folder.exists()


def test_a_merged_adapter_is_saved_as_it_is(folder, x):
    model = adapted()
    want = model(x)
    for layer in layers(model).values():
        layer.merge()
    save_adapter(model, folder)
    assert torch.equal(load_adapter(Model(), folder)(x), want)


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
    edit(folder, **fields)
    model = Model()
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, folder)
    assert str(folder) in str(caught.value) and not layers(model)


def test_a_configuration_that_is_none(folder):
    save_adapter(adapted(), folder)
    for text, message in (
        (b"{", "Expecting property name"),
        (b"1", "must hold a JSON object, got int"),
        (b"[" * 100_000, "recursion"),
        (b"\x00\xff", "(decode|Expecting)"),
    ):
        (folder / CONFIG).write_bytes(text)
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


def test_files_that_are_none(folder):
    save_adapter(adapted(), folder)
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{weights} is damaged"):
        load_adapter(Model(), folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=f"{folder}/adapter_model.bin is a pickle: open it"):
        load_adapter(Model(), folder)
    with pytest.raises(
        FileNotFoundError, match="^HUB/NAME does not exist here; of the hub's, `hf d"
    ):
        load_adapter(Model(), "HUB/NAME")
    with pytest.raises(FileNotFoundError, match=f"{folder.parent}/{CONFIG}"):
        load_adapter(Model(), folder.parent)
    with pytest.raises(NotADirectoryError, match=f"{folder / CONFIG} is a file; an adapter is a"):
        load_adapter(Model(), folder / CONFIG)


def test_what_cannot_be_written(folder):
    save_adapter(adapted(), folder)
    before = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    below = folder / CONFIG / "below"
    for path in ("", "/", below, folder.with_name("n" * 256)):
        with pytest.raises(OSError, match=f"^{path or repr('')} cannot be written: ") as caught:
            save_adapter(adapted(), path)
        assert ".randlora" not in str(caught.value)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert os.listdir(folder.parent) == [folder.name] and len(os.listdir(folder)) == 2
