"""randlora_ext.peft: every field of RandLoraConfig, with stock PEFT as the oracle."""

import contextlib
import json
import warnings

import pytest
import torch
from peft_helpers import accelerated, assert_close, config, opened, pair, peft, relative, run
from safetensors.torch import load_file
from torch import nn

from randlora_ext.peft.bases import BASIS_NAMES


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        blocks = nn.ModuleList(nn.ModuleDict(self.block()) for _ in range(3))
        self.body = nn.ModuleDict({"layers": blocks})
        self.head = nn.Linear(24, 5)

    def block(self):
        return {"up": nn.Linear(24, 40), "down": nn.Linear(40, 24, bias=False)}

    def forward(self, x):
        for layer in self.body.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return self.head(x)


UNIFORM = {"sparse": False}
VERY_SPARSE = {"sparse": False, "very_sparse": True}
FIELDS = [
    {"r": 7, "randlora_alpha": 33, "projection_prng_key": 1234567890123},
    {"target_modules": r".*\.(1|2)\.down", "save_projection": False},
    {"target_modules": "all-linear", **VERY_SPARSE},
    {"init_weights": False, "save_projection": False, **VERY_SPARSE},
    {"bias": "all", "save_projection": False, **UNIFORM},
    {"bias": "randlora_only", "randlora_dropout": 0.3, **UNIFORM},
    {"modules_to_save": ["head"], "randlora_dropout": 0.3},
    {"fan_in_fan_out": True},  # which PEFT corrects
    {"layers_to_transform": [0, 2]},
    {"layers_to_transform": 1, "layers_pattern": "layers"},
]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: ", ".join(field))
def test_output_gradients_and_saved_file_are_those_of_stock(tmp_path, field, x):
    fields = {"r": 5, "target_modules": ["up", "down"], "sparse": True} | field
    stock, ours = pair(Stack().double(), lambda: peft.RandLoraConfig(**fields))
    names = [name for name, p in stock.named_parameters() if p.requires_grad]
    assert names == [name for name, p in ours.named_parameters() if p.requires_grad]
    x, dy = x.double(), torch.randn(6, 5).double()
    # uniform bases are stored in 16 bits
    assert_close(run(ours, x, dy), run(stock, x, dy), 1e-6)

    tensors, fields = [], []
    for model, name in ((stock, "stock"), (ours, "ours")):
        model.save_pretrained(tmp_path / name)
        tensors.append(load_file(tmp_path / name / "adapter_model.safetensors"))
        fields.append(json.loads((tmp_path / name / "adapter_config.json").read_text()))
    assert fields[0] == fields[1]
    theirs, mine = tensors
    copies = {key for key in theirs if ".model." in key and key.endswith(("_A", "_B"))}
    assert mine.keys() == theirs.keys() - copies
    for key, value in mine.items():
        assert relative(value, theirs[key]) < 1e-12 and value.dtype == theirs[key].dtype
    # each reads what the other wrote
    want = ours.eval()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Specified to not save basis_A")
        for writer in ("stock", "ours"):
            assert relative(opened(tmp_path / writer, lambda: Stack().double())(x), want) < 1e-6
        accelerated.disable()
    with pytest.warns() if copies else contextlib.nullcontext():  # there is no copy in each layer
        loaded = opened(tmp_path / "ours", lambda: Stack().double())
    assert relative(loaded(x), want) < 1e-6


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("kind", [{"sparse": True}, {"very_sparse": True}, {}], ids=str)
def test_first_numbers_and_random_state_are_those_of_stock(kind, init_weights):
    """A script that sets a seed goes on with the same data order and dropout."""
    results = []
    for enabled in (False, True):
        accelerated.enable() if enabled else accelerated.disable()
        base = Stack()
        torch.manual_seed(4)
        chosen = config(5, targets=["up", "down"], init_weights=init_weights, **kind)
        model = peft.get_peft_model(base, chosen)
        results.append(
            {name: p.clone() for name, p in model.named_parameters()}
            | {"random state": torch.get_rng_state()}
            | {name: getattr(model.base_model, name)["default"] * 1 for name in BASIS_NAMES}
        )
    assert results[0].keys() == results[1].keys()
    for name, wanted in results[0].items():
        assert torch.equal(results[1][name], wanted), name
    lambdas = [value for name, value in results[1].items() if "randlora_lambda" in name]
    assert lambdas and all(bool(value.any()) == (not init_weights) for value in lambdas)


@pytest.mark.parametrize("r, alpha, warns", [(4, 640, True), (32, 640, False), (4, -81, True)])
def test_a_scaling_beyond_what_was_trained_warns(r, alpha, warns):
    accelerated.enable()
    settings = config(r, targets=["0"], randlora_alpha=alpha)
    model = nn.Sequential(nn.Linear(40, 40))
    told = rf"r={r} scales dW by {alpha / r:g}; .* is randlora_alpha=80"
    with pytest.warns(UserWarning, match=told) if warns else warnings.catch_warnings():
        warnings.simplefilter("always" if warns else "error")
        peft.get_peft_model(model, settings)


@pytest.mark.parametrize("r", [2**16 + 1, 2**31 - 1])
def test_a_mistyped_r_is_refused_before_anything_is_drawn(r):
    accelerated.enable()
    model = nn.Sequential(nn.Linear(40, 40))
    stock = config(r, targets=["0"])
    for use in (lambda: accelerated.RandLoraConfig(r=r), lambda: peft.get_peft_model(model, stock)):
        with pytest.raises(ValueError, match=rf"r must be an integer in \[1, 65536\], got {r}"):
            use()
    assert type(model[0]) is nn.Linear
