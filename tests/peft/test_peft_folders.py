"""One format: what `save_adapter` writes PEFT opens, and what PEFT writes `load_adapter` opens."""

import warnings

import pytest
import torch
from expert_models import EXPERTS, MODELS, logits, make, with_scales
from language_models import llama
from peft_helpers import Deep, accelerated, adapted, opened, peft, randomize
from safetensors.torch import load_file
from same_adapters import assert_same, parameters
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from randlora_ext import apply_randlora, calibrate, load_adapter, save_adapter

pytestmark = [
    pytest.mark.usefixtures("stock_peft"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]
WEIGHTS = "adapter_model.safetensors"


class Columns(Deep):
    """Two layers that store (in, out), one of them square, and one that does not."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Conv1D(40, 24), Conv1D(40, 40)
        self.c = nn.Linear(40, 24)


def calibrated(model):
    rows = torch.randn(64, 24) * torch.linspace(0.1, 3, 24)
    calibrate(randomize(model, size=0), [rows.to(next(model.parameters()).dtype)])
    return randomize(model)


NETS = {
    "hadamard": (Deep, "abc", {"basis": "hadamard"}),
    "independent": (Deep, "abc", {"basis": "independent", "density": 0.3}),
    "one layer": (Deep, "b", {"basis": "hadamard"}),
    "Conv1D": (Columns, "abc", {"basis": "hadamard"}),
    "dropout": (Deep, "abc", {"basis": "hadamard", "randlora_dropout": 0.25}),
    "bfloat16": (lambda: Deep().bfloat16(), "abc", {"basis": "hadamard"}),
    "float64": (lambda: Deep().double(), "abc", {"basis": "independent"}),
}


def applied(net):
    base, targets, options = NETS[net]
    model = apply_randlora(base(), [*targets], r=5, randlora_alpha=7.3, seed=11, **options)
    return calibrated(model) if options["basis"] == "hadamard" else randomize(model)


@pytest.mark.parametrize("net", NETS)
def test_trained_without_peft_and_served_with_it(tmp_path, net):
    model = applied(net)
    save_adapter(model, tmp_path)
    accelerated.enable()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(only in part|not used|missing)")
        served = opened(tmp_path, NETS[net][0])
    assert_same(served, model)


@pytest.mark.parametrize("net", NETS)
def test_trained_with_peft_and_served_without(tmp_path, net):
    base, targets, options = NETS[net]
    model = adapted(base(), targets, randlora_alpha=7, projection_prng_key=11, **options)
    if net == "hadamard":
        calibrated(model)
    model.save_pretrained(tmp_path)
    accelerated.disable()
    assert_same(load_adapter(base(), tmp_path), model)


@pytest.mark.parametrize("net", NETS)
def test_peft_writes_the_tensors_that_it_has_read(tmp_path, net):
    save_adapter(applied(net), tmp_path)
    accelerated.enable()
    opened(tmp_path, NETS[net][0]).save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / WEIGHTS) for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("net", NETS)
def test_back_again_without_peft(tmp_path, net):
    model, base = applied(net), NETS[net][0]
    save_adapter(model, tmp_path)
    accelerated.enable()
    opened(tmp_path, base).save_pretrained(tmp_path / "again")
    assert_same(load_adapter(base(), tmp_path / "again"), model)


# ---- experts -------------------------------------------------------------------------------------


def assert_same_experts(served, model):
    assert torch.equal(logits(served), logits(model))
    first, second = parameters(model), parameters(served)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("name", MODELS)
def test_experts_from_ours(tmp_path, name):
    """Beside linear layers, calibrated, each expert on its own."""
    model = apply_randlora(make(name), ["o_proj"], target_parameters=EXPERTS, r=4)
    save_adapter(with_scales(randomize(model)), tmp_path)
    accelerated.enable()
    assert_same_experts(opened(tmp_path, lambda: make(name)), model)


@pytest.mark.parametrize("name", MODELS)
def test_experts_from_peft(tmp_path, name):
    options = {"basis": "hadamard", "target_parameters": EXPERTS[::-1]}
    model = with_scales(adapted(make(name), ["o_proj"], 4, **options))
    model.save_pretrained(tmp_path)
    assert_same_experts(load_adapter(make(name), tmp_path), model)


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


# Experts of several parameters, whose layers are nested, around a linear layer.
@pytest.mark.parametrize("parameters, linear", STACKS, ids=str)
def test_layers_around_layers_from_ours(tmp_path, parameters, linear):
    model = randomize(apply_randlora(mixtures(), linear, target_parameters=parameters, r=4))
    save_adapter(with_scales(model), tmp_path)
    accelerated.enable()
    assert_same(opened(tmp_path, mixtures), model)


@pytest.mark.parametrize("parameters, linear", STACKS, ids=str)
def test_layers_around_layers_from_peft(tmp_path, parameters, linear):
    options = {"basis": "hadamard", "target_parameters": parameters}
    model = with_scales(adapted(mixtures(), linear, 4, **options))
    model.save_pretrained(tmp_path)
    assert_same(load_adapter(mixtures(), tmp_path), model)


@pytest.mark.parametrize("parameters, linear", STACKS, ids=str)
def test_layers_around_layers_and_back_again(tmp_path, parameters, linear):
    model = randomize(apply_randlora(mixtures(), linear, target_parameters=parameters, r=4))
    save_adapter(with_scales(model), tmp_path)
    accelerated.enable()
    opened(tmp_path, mixtures).save_pretrained(tmp_path / "again")
    assert_same(load_adapter(mixtures(), tmp_path / "again"), model)


# ---- who opens a folder --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "by",
    [
        AutoModelForCausalLM.from_pretrained,
        peft.AutoPeftModel.from_pretrained,
        peft.AutoPeftModelForCausalLM.from_pretrained,
    ],
    ids=["transformers", "AutoPeftModel", "AutoPeftModelForCausalLM"],
)
def test_a_folder_of_ours_names_the_base_model(tmp_path, by):
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = randomize(apply_randlora(base, ["q_proj", "down_proj"], r=4)).eval()
    save_adapter(model, tmp_path / "adapter")
    accelerated.enable()
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        assert torch.equal(by(tmp_path / "adapter").eval()(tokens).logits, model(tokens).logits)


# ---- what is refused -----------------------------------------------------------------------------


def test_bases_of_peft_are_refused(tmp_path):
    adapted(Deep(), "abc", sparse=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: PEFT draws the bases of this adapter; pef"):
        load_adapter(Deep(), tmp_path)


def test_save_adapter_refuses_a_model_of_peft(tmp_path):
    model = adapted(Deep(), "abc", basis="hadamard")
    with pytest.raises(TypeError, match=r"model has layers of PEFT, which has save_pretrained"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_save_adapter_refuses_a_stock_model(tmp_path):
    stock = peft.get_peft_model(Deep(), peft.RandLoraConfig(r=4, target_modules=["a"]))
    with pytest.raises(ValueError, match="model has no adapter.*a model of PEFT has save_pret"):
        save_adapter(stock, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_load_adapter_refuses_a_model_of_peft(tmp_path):
    model = adapted(Deep(), "abc", basis="hadamard")
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"PeftModel.from_pretrained\(model, folder\)"):
        load_adapter(model, tmp_path, "two")
