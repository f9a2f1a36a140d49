"""randlora_ext.peft: the numbers and files of stock PEFT, for every field of RandLoraConfig."""

import contextlib
import copy
import json
import math
import warnings

import pytest
import torch
from language_models import llama
from layer_cases import SHAPES as ALL_SHAPES
from peft_helpers import (
    Headed,
    Net,
    accelerated,
    assert_close,
    config,
    deltas,
    dense_of,
    inputs,
    layers,
    opened,
    pair,
    peft,
    relative,
    run,
    runs_on_kernels,
)
from safetensors.torch import load_file
from torch import nn

from randlora_ext.peft.bases import BASIS_NAMES

# Few numbers may all be zero, of which a warning tells.
SHAPES = [shape for shape in ALL_SHAPES if 1 not in shape[:2]]
KINDS = ["sparse", "very_sparse", "uniform"]


@pytest.mark.parametrize(
    "shape, kind, dtype",
    [
        *((shape, kind, torch.float64) for shape in SHAPES for kind in ("sparse", "uniform")),
        *((shape, "very_sparse", torch.float64) for shape in SHAPES[::4]),
        *((shape, kind, torch.float32) for shape in SHAPES[1::4] for kind in KINDS),
    ],
    ids=str,
)
def test_same_numbers_as_stock(shape, kind, dtype):
    in_features, out_features, r = shape
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12 if kind == "uniform" else 1e-10
    options = {} if kind == "uniform" else {kind: True}
    stock, ours = pair(Net(in_features, out_features).to(dtype), lambda: config(r, **options))
    assert runs_on_kernels(ours)
    if dtype is torch.float64:
        stock.double(), ours.double()
    x, dy = inputs(in_features, out_features, dtype)
    wanted = run(stock, x, dy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(run(ours, x, dy), wanted, tolerance)
    assert_close(deltas(ours), deltas(stock), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape, autocast_adapter", [((48, 64, 8), False), ((64, 48, 8), True)], ids=["16 bits", "fp32"]
)
def test_adapters_err_at_most_twice_as_much_as_stock(shape, dtype, autocast_adapter):
    """y, dx and the adapter's gradients of a 16-bit model."""
    in_features, out_features, r = shape
    base = Net(in_features, out_features).to(dtype)
    stock, ours = pair(
        base, lambda: config(r, sparse=True), autocast_adapter_dtype=autocast_adapter
    )
    dtypes = [{name: p.dtype for name, p in each.named_parameters()} for each in (stock, ours)]
    assert dtypes[0] == dtypes[1]
    for mine, theirs in zip(dense_of(layers(ours)[0]), dense_of(layers(stock)[0]), strict=True):
        assert mine.dtype is theirs.dtype is (torch.float32 if autocast_adapter else dtype)
        assert torch.equal(mine, theirs)
    x, dy = inputs(in_features, out_features, dtype, tokens=64)
    exact = run(copy.deepcopy(stock).double(), x.double(), dy.double())
    for mine, theirs, wanted in zip(run(ours, x, dy), run(stock, x, dy), exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert relative(mine, wanted) <= 2 * relative(theirs, wanted)


@pytest.mark.parametrize("case", ["conv1d", "uniform conv1d", "subclass"])
def test_other_base_layers(case):
    from transformers.pytorch_utils import Conv1D

    conv1d = "conv1d" in case
    base = Net(24, 40, Conv1D if conv1d else nn.Linear).double()
    if conv1d:
        nn.init.normal_(base.a.bias)
    if case == "subclass":
        base.a.__class__ = type("Special", (nn.Linear,), {})
    targets = "a" if conv1d else "abc"
    options = {"fan_in_fan_out": conv1d, "sparse": "uniform" not in case}
    stock, ours = pair(base, lambda: config(5, targets=targets, **options))
    stock.double(), ours.double()
    x, dy = inputs(24, 40, torch.float64)
    wanted = run(stock, x, dy)
    assert_close(run(ours, x, dy), wanted, 1e-10)
    mine, theirs = (deltas(model)[0] for model in (ours, stock))
    assert mine.shape == base.a.weight.shape and relative(mine, theirs) < 1e-10


def test_autocast():
    models = pair(Net(24, 40), lambda: config(5, sparse=True))
    x, dy = inputs(24, 40)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = (run(model, x, dy) for model in models)
    assert mine[0].dtype == torch.float32
    assert_close(mine, theirs, 0.01)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"up": (24, 40), "down": (40, 24)}
        blocks = (nn.ModuleDict({k: nn.Linear(*v) for k, v in sizes.items()}) for _ in range(3))
        self.body = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        for layer in self.body.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return self.head(x)


VERY_SPARSE = {"sparse": False, "very_sparse": True}
FIELDS = [
    {"r": 7, "randlora_alpha": 33, "projection_prng_key": 1234567890123},
    {"target_modules": r".*\.(1|2)\.down", "save_projection": False},
    {"target_modules": "all-linear", **VERY_SPARSE},
    {"init_weights": False, "save_projection": False, **VERY_SPARSE},
    {"bias": "all", "save_projection": False, "sparse": False},
    {"bias": "randlora_only", "randlora_dropout": 0.3, "sparse": False},
    {"modules_to_save": ["head"], "randlora_dropout": 0.3},
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

    tensors, texts = [], []
    for model, name in ((stock, "stock"), (ours, "ours")):
        model.save_pretrained(tmp_path / name)
        tensors.append(load_file(tmp_path / name / "adapter_model.safetensors"))
        texts.append(json.loads((tmp_path / name / "adapter_config.json").read_text()))
    assert texts[0] == texts[1]
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
            | dict(zip(BASIS_NAMES, dense_of(model.base_model), strict=True))
        )
    assert results[0].keys() == results[1].keys()
    for name, wanted in results[0].items():
        assert torch.equal(results[1][name], wanted), name
    lambdas = [value for name, value in results[1].items() if "randlora_lambda" in name]
    assert lambdas and all(bool(value.any()) == (not init_weights) for value in lambdas)


MISTYPED = {
    "r": (2**16 + 1, r"r must be a Python integer in \[1, 65536\], got 65537"),
    "randlora_alpha": (math.nan, "randlora_alpha must be a finite number, got nan"),
}


@pytest.mark.parametrize("field", MISTYPED)
def test_our_configuration_refuses_a_mistyped_number(field):
    value, message = MISTYPED[field]
    accelerated.enable()
    with pytest.raises(ValueError, match=message):
        accelerated.RandLoraConfig(**{field: value})


@pytest.mark.parametrize("field", MISTYPED)
def test_a_model_refuses_a_mistyped_number_of_stock_configuration(field):
    """Before any basis is drawn."""
    value, message = MISTYPED[field]
    stock = peft.RandLoraConfig(target_modules=["0"], **{field: value})
    accelerated.enable()
    model = nn.Sequential(nn.Linear(40, 40))
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, stock)
    assert type(model[0]) is nn.Linear


@pytest.mark.filterwarnings("ignore:randlora_alpha")
@pytest.mark.parametrize("r", [65, 100, 161])
def test_an_r_larger_than_a_layer_is_told(r):
    """By the smaller side of the smallest layer."""
    accelerated.enable()
    net = nn.Sequential(nn.Linear(64, 160), nn.Linear(160, 64))
    with pytest.warns(UserWarning, match=rf"r = {r} is more than min\(in_.*\) = 64, with which"):
        peft.get_peft_model(net, config(r, targets=["0", "1"]))


def test_an_r_as_large_as_the_smallest_side_is_not_told():
    accelerated.enable()
    net = nn.Sequential(nn.Linear(64, 160), nn.Linear(160, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.get_peft_model(net, config(64, targets=["0", "1"], randlora_alpha=64))


@pytest.mark.parametrize("r, alpha", [(4, 640), (4, -81)])
def test_a_scaling_beyond_what_was_trained_is_told(r, alpha):
    accelerated.enable()
    told = rf"r={r} scales dW by {alpha / r:g}; .* is randlora_alpha=80"
    with pytest.warns(UserWarning, match=told):
        settings = config(r, targets=["0"], randlora_alpha=alpha)
        peft.get_peft_model(nn.Sequential(nn.Linear(40, 40)), settings)


def test_the_default_scaling_is_not_warned_of():
    accelerated.enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = config(32, targets=["0"], randlora_alpha=640)
        peft.get_peft_model(nn.Sequential(nn.Linear(40, 40)), settings)


def test_names_that_match_nothing_beside_others_are_told_where_the_model_is_made():
    accelerated.enable()
    options = {"basis": "hadamard", "randlora_alpha": 80}
    wrong = accelerated.RandLoraConfig(
        r=4, target_modules=["a", "bb"], modules_to_save=["head", "haed"], **options
    )
    with pytest.warns(UserWarning) as caught:
        peft.get_peft_model(Headed(), wrong)
    told = {str(w.message) for w in caught}
    assert told == {
        "target_modules that match no module of Headed: bb",
        "modules_to_save that match no module of Headed: haed",
    }
    assert {w.filename for w in caught} == {__file__}
    right = accelerated.RandLoraConfig(
        r=4, target_modules=["a", "b"], modules_to_save=["head"], **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.get_peft_model(Headed(), right).add_adapter("two", right)


def test_layers_beside_a_text_of_targets_are_warned_of():
    """PEFT adapts all of them."""
    accelerated.enable()
    settings = accelerated.RandLoraConfig(r=4, target_modules=".*q_proj", layers_to_transform=1)
    with pytest.warns(UserWarning, match="layers_to_transform 1 does nothing beside target_mod"):
        model = peft.get_peft_model(llama(), settings)
    assert len(layers(model)) == model.config.num_hidden_layers > 1


def test_targets_in_no_layer_that_is_there():
    accelerated.enable()
    settings = accelerated.RandLoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[7])
    told = r"'q_proj'} matches no linear layer of LlamaFor\w+ in layers_to_transform \[7\]; its"
    with pytest.raises(ValueError, match=told):
        peft.get_peft_model(llama(), settings)
