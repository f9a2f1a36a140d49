"""`save_adapter` and `load_adapter`: what they keep, and what they refuse before a change."""

import copy
import json
import os

import pytest
import torch
from layer_helpers import layers, make_base, randomize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from randlora_ext import RandLoraLinear, apply_randlora, load_adapter, save_adapter

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
def file(tmp_path):
    return tmp_path / "adapter.safetensors"


def test_a_round_trip_onto_the_base_model(file, x):
    model = adapted(randlora_dropout=0.25)
    save_adapter(model, file)
    base = Model()
    assert load_adapter(base, file) is base
    assert base.tied is base.block["up"]
    for name, layer in layers(model).items():
        other = layers(base)[name]
        assert other.extra_repr() == layer.extra_repr() and other.scaling == layer.scaling
        assert other.bases == layer.bases and other.randlora_dropout["default"].p == 0.25
    trained = [n for n, p in base.named_parameters() if p.requires_grad]
    assert trained == [n for n, p in model.named_parameters() if p.requires_grad]
    assert torch.equal(base.eval()(x), model.eval()(x))
    assert base.state_dict().keys() == model.state_dict().keys()
    assert os.listdir(file.parent) == [file.name]


def test_the_file_says_what_it_belongs_to(file):
    save_adapter(adapted(), file)
    paths, kinds = ("up", "down", "block.up", "tied"), ("lambda", "gamma")
    assert load_file(file).keys() == {f"{at}.randlora_{kind}" for at in paths for kind in kinds}
    basis = f"randlora_ext:independent-1:density=0.3:seed={2**63 + 5}"
    square = [16, 16, False]
    assert description(file) == {
        "adapter_name": "default", "r": 5, "scaling": 9 / 5, "randlora_dropout": 0.0,
        "basis": basis,
        "layers": {
            "up": [16, 24, False], "down": [24, 16, False], "block.up": square, "tied": square
        },
    }  # fmt: skip


def test_several_adapters(file, x):
    model = adapted()
    alone = model(x)
    save_adapter(adapted(numbers=2, r=3, density=0.7), file)
    load_adapter(model, file, adapter_name="other")
    assert torch.equal(model(x), alone)  # not active
    assert not any(layer.randlora_lambda["other"].requires_grad for layer in layers(model).values())
    for layer in layers(model).values():
        layer.set_adapter("other")
    assert torch.equal(model(x), adapted(numbers=2, r=3, density=0.7)(x))
    save_adapter(model, file, adapter_name="other")
    fresh = load_adapter(Model(), file)
    assert layers(fresh)["up"].active_adapters == ["other"] and torch.equal(fresh(x), model(x))


def test_adapters_of_different_layers(file, x):
    """One file has one set of options; what has others is an adapter of its own."""

    def made(second):
        model = apply_randlora(Model().double(), ["down"], r=3, density=0.9, basis="independent")
        return randomize(apply_randlora(model, ["up"], r=4, seed=8, adapter_name=second))

    with pytest.raises(ValueError, match="'default' has .*'r': 4.*'r': 3|'r': 3.*'r': 4.*other na"):
        save_adapter(made("default"), file)
    assert not file.exists()
    model, loaded = made("two"), Model().double()
    for name in ("default", "two"):
        save_adapter(model, file, name)
        load_adapter(loaded, file)
    assert torch.equal(loaded(x.double()), model(x.double()))
    assert loaded.tied is loaded.block["up"].base_layer


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_one_layer(file, kind):
    layer = randomize(RandLoraLinear(make_base(8, 12, kind), r=3))
    save_adapter(torch.compile(layer), file)
    other = RandLoraLinear(make_base(8, 12, kind), r=3)
    load_adapter(other, file, "two")
    other.set_adapter("two")
    assert torch.equal(other(torch.ones(8)), layer(torch.ones(8)))
    with pytest.raises(ValueError, match="cannot be replaced"):
        load_adapter(nn.Linear(8, 12), file)


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_a_layer_that_is_wrapped_alone(file, wrap):
    """The file does not name the wrapper."""
    model = randomize(apply_randlora(two_squares(), ["0", "1"], r=2))
    base = nn.Sequential(*(copy.deepcopy(layer.base_layer) for layer in model))
    want = model(x := torch.randn(3, 8))
    model[0] = wrap(model[0])
    save_adapter(model, file)
    assert torch.equal(load_adapter(base, file)(x), want)


def test_modules_to_save_go_along(file, x):
    model = randomize(with_head())
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    save_adapter(model, file)
    parameters = {"0.block.norm.weight", "0.block.norm.bias", "1.weight", "1.bias"}
    kinds = "lambda", "gamma", "input_scale"
    own = {f"0.{path}.randlora_{kind}" for path in ("up", "block.up") for kind in kinds}
    assert load_file(file).keys() == parameters | own
    loaded = load_adapter(nn.Sequential(Model(), nn.Linear(16, 3)), file)
    torch.testing.assert_close(loaded(x), model(x))
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad and "rand" not in n}
    assert trained == parameters
    again = file.with_name("again")
    save_adapter(loaded, again)
    assert again.read_bytes() == file.read_bytes()


# ---- what is refused, before anything changes ---------------------------------------------------


def replaced(path, module):
    model = Model()
    model.set_submodule(path, module)
    return model


def nested():
    holder = nn.ModuleDict({"base_layer": nn.Linear(24, 40)})
    return apply_randlora(nn.Sequential(holder), ["base_layer"], r=4)


MISFITS = {
    "wider": (adapted, lambda: Model(hidden=32), r"up: .*transposed, .* are \[16, 32, "),
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
def test_a_model_that_does_not_fit(file, case):
    saved, make, message = MISFITS[case]
    save_adapter(saved(), file)
    model = make()
    before, modules = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TypeError if case == "not linear" else ValueError, match=message):
        load_adapter(model, file)
    assert [type(m) for m in model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == trained
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert case == "meta" or all(torch.equal(after[key], before[key]) for key in before)


def test_what_has_no_adapter_is_not_saved(file):
    for model, name, told in (
        (Model(), "default", r"save_pretrained\) must be one of \[\], got 'default'"),
        (adapted(), "x", r"^adapter_name .* must be one of \['default'\], got 'x'"),
        (adapted().to("meta"), "default", "randlora_lambda has no numbers here"),
    ):
        with pytest.raises(ValueError, match=told):
            save_adapter(model, file, adapter_name=name)
        assert not file.exists()


def description(file):
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["randlora_adapter"])


def of(**options):
    return lambda said: said.update(options)


DESCRIPTIONS = {
    "no layers": (of(layers={}), "0 layers"),
    "a layer a number": (lambda said: said["layers"].update(up=3), "no sound file"),
    "no name": (lambda said: said.pop("adapter_name"), "missing .*'adapter_name'"),
    "more": (of(more=1), "'more'"),
    "a layer less": (lambda said: said["layers"].pop("up"), "up.randlora_gamma: there is no such"),
    "a layer more": (lambda said: said["layers"].update(x=[4, 4, 0]), "'x.randlora_lambda' is m"),
    "r": (of(r=6), r"up.randlora_lambda is \(5, 4\), and must be \(6, 3\)"),
    "r huge": (of(r=2**62 + 1, basis="randlora_ext:hadamard-1:seed=1"), "\\[1, 65536\\]"),
    "features a text": (lambda said: said["layers"].update(up="abc"), "in_features must be"),
    "scaling": (of(scaling=float("nan")), "scaling must be a finite"),
    "dropout": (of(randlora_dropout=1), "in .0, 1"),
    "basis": (of(basis="independent"), "no key of a basis"),
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_description_that_is_wrong(file, case):
    change, message = DESCRIPTIONS[case]
    save_adapter(adapted(), file)
    said, model = description(file), Model()
    change(said)
    save_file(load_file(file), file, metadata={"randlora_adapter": json.dumps(said)})
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, file)
    assert str(file) in str(caught.value) and not layers(model)


def test_files_that_are_none(file):
    save_adapter(adapted(), file)
    tensors, told = load_file(file), json.dumps(description(file))
    integers = {name: tensor.to(torch.int8) for name, tensor in tensors.items()}
    for content, text, message in (
        (integers, told, "must be floating point"),
        (tensors, None, "'randlora_adapter' is missing; PeftModel.from_pretrained"),
        (tensors, "{", "no sound file"),
        (tensors, "1", "no sound file"),
        (tensors, "[" * 100_000, "no sound file.*recursion"),
    ):
        save_file(content, file, metadata=text and {"randlora_adapter": text})
        with pytest.raises(ValueError, match=message):
            load_adapter(Model(), file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="damaged"):
        load_adapter(Model(), file)
    for path in (file.with_name("nowhere"), file.parent):
        with pytest.raises(OSError, match=str(path)):
            load_adapter(Model(), path)


def test_what_cannot_be_written(file):
    save_adapter(adapted(), file)
    before = file.read_bytes()
    for path in ("", "/", ".", file / "below", file.parent / "no" / "a", file.with_name("n" * 256)):
        with pytest.raises(OSError, match=f"^{path or repr('')} cannot be written: ") as caught:
            save_adapter(adapted(), path)
        assert ".randlora" not in str(caught.value)
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]
