"""A saved adapter comes back bit for bit: of every layer, dtype and parameter; what files hold."""

import warnings

import pytest
import torch
from expert_models import EXPERTS, FAMILIES, logits, make, with_scales
from language_models import llama
from layer_helpers import uneven
from peft_experts import moe
from peft_helpers import (
    Deep,
    Headed,
    accelerated,
    adapted,
    assert_close,
    deltas,
    dense_of,
    layers,
    made,
    opened,
    peft,
    randomize,
    shake,
    stock_made,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from randlora_ext import calibrate

pytestmark = pytest.mark.filterwarnings("ignore:randlora_alpha")
TENSORS = "adapter_model.safetensors"


class Columns(Deep):
    """Two layers that store (in, out), one of them square, and one that does not."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Conv1D(40, 24), Conv1D(40, 40)
        self.c = nn.Linear(40, 24)


NETS = {
    "hadamard": (Deep, {"basis": "hadamard"}),
    "independent": (Deep, {"basis": "independent", "density": 0.3}),
    "one layer": (Deep, {"basis": "hadamard", "targets": "b"}),
    "Conv1D": (Columns, {"basis": "hadamard"}),
    "dropout": (Deep, {"basis": "hadamard", "randlora_dropout": 0.25}),
    "bfloat16": (lambda: Deep().bfloat16(), {"basis": "hadamard"}),
    "float64": (lambda: Deep().double(), {"basis": "independent"}),
    "sparse": (Deep, {"sparse": True}),
    "uniform": (Deep, {}),
}


def trained(net):
    """With a calibrated adapter, if it can be."""
    base, options = NETS[net]
    options = {"targets": "abc", "randlora_alpha": 7, "projection_prng_key": 11} | options
    model = adapted(base(), **options)
    if options.get("basis") == "hadamard":
        rows = uneven(64).to(next(model.parameters()).dtype)
        calibrate(randomize(model, size=0), [rows])
    return randomize(model).eval()


def fitting(folder, base):
    """The model that is opened; a warning of tensors that do not fit is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(only in part|not used|missing)")
        return opened(folder, base).eval()


@torch.no_grad()
@pytest.mark.parametrize("net", NETS)
def test_an_adapter_comes_back(tmp_path, net):
    model, base = trained(net), NETS[net][0]
    model.save_pretrained(tmp_path)
    again = fitting(tmp_path, base)
    x = uneven(6, seed=3).to(next(model.parameters()).dtype)
    assert torch.equal(again(x), model(x))
    own, theirs = model.state_dict(), again.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], own[name]) for name in own)
    assert all(theirs[name].dtype == own[name].dtype for name in own)


@pytest.mark.parametrize("net", NETS)
def test_the_tensors_that_were_read_are_written_again(tmp_path, net):
    trained(net).save_pretrained(tmp_path)
    opened(tmp_path, NETS[net][0]).save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / TENSORS) for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


# ---- experts -------------------------------------------------------------------------------------

IN_EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)


@IN_EVERY_FAMILY
def test_experts_come_back(tmp_path, name):
    """Beside linear layers, with input scales, by parameters in another order."""
    model = with_scales(moe(name, targets=["o_proj"], target_parameters=EXPERTS[::-1]))
    model.save_pretrained(tmp_path)
    again = fitting(tmp_path, lambda: make(name))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("low", [False, True])
def test_experts_are_opened_by_peft_s_auto_class(tmp_path, of_experts, low):
    by_class = peft.AutoPeftModelForCausalLM.from_pretrained
    opened = by_class(tmp_path / "adapter", low_cpu_mem_usage=low)
    assert torch.equal(logits(opened), logits(of_experts))


@pytest.fixture
def of_experts(tmp_path):
    """An adapter of experts and linear layers, saved beside its base model."""
    model = with_scales(moe("Qwen3Moe", targets=["q_proj"], task_type="CAUSAL_LM"))
    make("Qwen3Moe").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return model


def by_auto_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "adapter")


def by_load_adapter(folder):
    model = make("Qwen3Moe")
    model.load_adapter(str(folder / "adapter"))
    return model


@pytest.mark.parametrize("open_by", [by_auto_model, by_load_adapter])
def test_experts_are_opened_by_transformers(tmp_path, of_experts, open_by, caplog):
    assert torch.equal(logits(open_by(tmp_path)), logits(of_experts))
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text


def test_names_and_shapes_in_a_file(tmp_path, of_experts):
    saved = load_file(tmp_path / "adapter" / TENSORS)
    shapes = {key.split("mlp.")[1]: value.shape for key, value in saved.items() if "0.mlp" in key}
    records = [shapes.pop(key) for key in list(shapes) if "randlora_record" in key]
    assert len(records) == 2
    assert shapes == {
        "experts.adapted_parameters.gate_up_proj.randlora_lambda": (4, 4, 8),
        "experts.adapted_parameters.gate_up_proj.randlora_gamma": (4, 8, 32),
        "experts.adapted_parameters.gate_up_proj.randlora_input_scale": (4, 32),
        "experts.adapted_parameters.down_proj.randlora_lambda": (4, 4, 6),
        "experts.adapted_parameters.down_proj.randlora_gamma": (4, 6, 24),
        "experts.adapted_parameters.down_proj.randlora_input_scale": (4, 24),
    }


def load_over(model, folder):
    model.load_adapter(folder, "default")
    model.set_adapter("default")


def load_anew(model, folder):
    model.load_adapter(folder, "three")
    model.set_adapter("three")


@pytest.mark.parametrize("load", [load_over, load_anew])
def test_experts_are_loaded_beside_another_adapter(tmp_path, load):
    saved, model = moe(seed=3), moe(seed=1)
    saved.save_pretrained(tmp_path)
    options = {"basis": "hadamard", "target_parameters": EXPERTS[:1], "target_modules": []}
    model.add_adapter("two", accelerated.RandLoraConfig(r=8, projection_prng_key=7, **options))
    model.set_adapter("two")
    load(randomize(model, 2), tmp_path)
    assert torch.equal(logits(model), logits(saved))


class Mixture(nn.Module):
    """Experts around a linear layer, beside parameters of the same last names elsewhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(24, 24)
        self.up = nn.Parameter(torch.randn(3, 40, 24))
        self.down = nn.Parameter(torch.randn(3, 24, 40))
        self.matrix = nn.Parameter(torch.randn(24, 24))

    def forward(self, x):
        h = torch.einsum("ti,eoi->eto", self.linear(x), self.up).relu()
        return torch.einsum("eti,eoi->to", h, self.down) @ self.matrix.T


STACKS = [
    (["up"], ["linear"]),
    (["up", "down", "matrix"], ["linear"]),
    (["matrix", "up"], []),
    (["1.down"], ["0.linear"]),
    (["1.down", "0.up", "0.matrix"], ["1.linear"]),
]


def mixtures():
    return nn.Sequential(Mixture(), Mixture())


@pytest.mark.parametrize("parameters, linear", STACKS, ids=str)
def test_linear_layers_inside_modules_with_adapted_parameters(tmp_path, parameters, linear, x):
    options = {"basis": "hadamard", "target_parameters": parameters}
    model = with_scales(adapted(mixtures(), linear, 4, **options))
    model.save_pretrained(tmp_path)
    assert torch.equal(fitting(tmp_path, mixtures)(x), model(x))


# ---- what is trained whole beside the adapter ----------------------------------------------------


class Normed(Headed):
    """With a head that has buffers."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(40), nn.Linear(40, 3))


@torch.no_grad()
def test_modules_to_save_come_back(tmp_path, x):
    model = adapted(Normed(), "ab", basis="hadamard", modules_to_save=["head"])
    shake(model)
    model.train()(torch.randn(50, 24))
    model.save_pretrained(tmp_path)
    assert torch.equal(opened(tmp_path, Normed).eval()(x), model.eval()(x))


@torch.no_grad()
@pytest.mark.parametrize("bias", ["all", "randlora_only"])
def test_biases_come_back(tmp_path, bias, x):
    model = adapted(Deep(), "ab", basis="hadamard", bias=bias)
    shake(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(opened(tmp_path)(x), model(x))


@torch.no_grad()
def test_an_adapted_head_comes_back_with_its_base_weight(tmp_path):
    """PEFT saves it, too, if it has the name of an embedding layer."""
    model = adapted(llama(), ["lm_head", "q_proj"], basis="hadamard").eval()
    model.get_submodule("base_model.model.lm_head").base_layer.weight.add_(1)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    tokens = torch.arange(8).view(1, 8)
    assert torch.equal(opened(tmp_path, llama)(tokens).logits, model(tokens).logits)


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{"sparse": True}, {}], ids=["packed", "uniform"])
def test_a_file_in_float32_is_not_rounded_on_a_bf16_base(tmp_path, kind):
    stock = stock_made(**kind)
    stock.save_pretrained(tmp_path / "float32")
    accelerated.enable()
    loaded = opened(tmp_path / "float32", lambda: Deep().bfloat16())
    assert_close(deltas(loaded), deltas(stock), 1e-6)
    for mine, theirs in zip(layers(loaded), layers(stock), strict=True):
        assert all(map(torch.equal, dense_of(mine), dense_of(theirs)))
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / each / TENSORS) for each in ("float32", "again"))
    assert all(torch.equal(again[name], first[name]) for name in again)


def test_a_state_of_parameters_and_buffers_is_saved_with_records(tmp_path):
    """DeepSpeed's ZeRO-3 gathers these alone."""
    model = made(basis="hadamard")
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    model.save_pretrained(tmp_path / "gathered", state_dict=state)
    model.save_pretrained(tmp_path / "usual")
    gathered, usual = (load_file(tmp_path / name / TENSORS) for name in ("gathered", "usual"))
    assert gathered.keys() == usual.keys()
    assert all(torch.equal(gathered[key], usual[key]) for key in usual)


CASTS = [  # each pair of values once
    ({"sparse": True}, True, torch.bfloat16, torch.bfloat16),
    ({"sparse": True}, False, torch.float16, torch.float16),
    ({"very_sparse": True}, True, torch.float16, torch.float32),
    ({"density": 0.2}, False, torch.bfloat16, torch.float32),
]


def open_cast(folder, dtype, **options):
    return opened(folder, lambda: Deep().to(dtype))


def load_over_cast(folder, dtype, **options):
    model = made(**options).to(dtype)
    model.load_adapter(folder, "default")
    return model


@pytest.mark.parametrize("load", [open_cast, load_over_cast])
@pytest.mark.parametrize("options,save_projection,dtype,back", CASTS, ids=str)
def test_a_round_trip_after_a_cast(tmp_path, options, save_projection, dtype, back, load):
    """The value of 16-bit bases is rounded where PEFT rounds it."""
    options = options | {"save_projection": save_projection}
    model = made(**options).to(dtype).to(back)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, back, **options)
    assert_close(deltas(loaded), deltas(model), 1e-6)
    for ours, theirs in zip(layers(loaded), layers(model), strict=True):
        bases = [one.basis_of("default", one.weight.device).dense() for one in (ours, theirs)]
        assert_close(*bases, 1e-6)
