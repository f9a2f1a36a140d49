"""One format: what `save_adapter` writes PEFT opens, and what PEFT writes `load_adapter` opens."""

import json
import warnings

import pytest
import torch
from cli_helpers import llama
from expert_models import EXPERTS, MODELS, logits, make, with_scales
from peft_helpers import Deep, Headed, accelerated, adapted, opened, peft, randomize, shake
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from randlora_ext import apply_randlora, calibrate, load_adapter, save_adapter

pytestmark = pytest.mark.usefixtures("stock_peft")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
X = torch.randn(6, 24, generator=torch.Generator().manual_seed(3))


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


def inputs(model):
    return X.to(next(model.parameters()).dtype)


def parameters(model):
    """Lambda, gamma and input scale by their names in PEFT's files."""
    named = (*model.named_parameters(), *model.named_buffers())
    kinds = "randlora_lambda", "randlora_gamma", "randlora_input_scale"
    return {
        name.removeprefix("base_model.model."): tensor.detach()
        for name, tensor in named
        if any(kind in name for kind in kinds)
    }


def assert_same(one, other):
    """Bit for bit: outputs, parameters and scalings."""
    first, second = parameters(one), parameters(other)
    assert first.keys() == second.keys() and len(first) > 0
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name])
    scalings = [
        [layer.scaling["default"] for layer in model.modules() if hasattr(layer, "scaling")]
        for model in (one, other)
    ]
    assert scalings[0] == scalings[1]
    with torch.no_grad():
        assert torch.equal(one.eval()(inputs(one)), other.eval()(inputs(other)))


def applied(base, targets, **options):
    model = apply_randlora(base(), [*targets], r=5, randlora_alpha=7.3, seed=11, **options)
    return calibrated(model) if options["basis"] == "hadamard" else randomize(model)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_trained_without_peft_and_served_with_it(tmp_path, net):
    base, targets, options = NETS[net]
    model = applied(base, targets, **options)
    save_adapter(model, tmp_path)
    accelerated.enable()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(only in part|not used|missing)")
        served = opened(tmp_path, base)
    assert_same(served, model)
    served.save_pretrained(tmp_path / "again")
    assert_same(load_adapter(base(), tmp_path / "again"), model)
    first, again = (load_file(folder / WEIGHTS) for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_trained_with_peft_and_served_without(tmp_path, net):
    base, targets, options = NETS[net]
    model = adapted(base(), targets, randlora_alpha=7, projection_prng_key=11, **options)
    if net == "hadamard":
        calibrated(model)
    model.save_pretrained(tmp_path)
    accelerated.disable()
    assert_same(load_adapter(base(), tmp_path), model)


@pytest.mark.parametrize("own", [True, False], ids=["from ours", "from PEFT"])
@pytest.mark.parametrize("name", MODELS)
def test_experts(tmp_path, name, own):
    """Beside linear layers, calibrated, each expert on its own."""
    if own:
        model = apply_randlora(make(name), ["o_proj"], target_parameters=EXPERTS, r=4)
        save_adapter(with_scales(randomize(model)), tmp_path)
        accelerated.enable()
        served = opened(tmp_path, lambda: make(name))
    else:
        options = {"basis": "hadamard", "target_parameters": EXPERTS[::-1]}
        model = with_scales(adapted(make(name), ["o_proj"], 4, **options))
        model.save_pretrained(tmp_path)
        served = load_adapter(make(name), tmp_path)
    assert torch.equal(logits(served), logits(model))
    first, second = parameters(model), parameters(served)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


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


@pytest.mark.parametrize("parameters, linear", STACKS, ids=str)
def test_layers_around_layers(tmp_path, parameters, linear):
    """Experts of several parameters, whose layers are nested, around a linear layer."""

    def base():
        return nn.Sequential(Mixture(), Mixture())

    model = randomize(apply_randlora(base(), linear, target_parameters=parameters, r=4))
    save_adapter(with_scales(model), tmp_path / "ours")
    accelerated.enable()
    served = opened(tmp_path / "ours", base)
    assert_same(served, model)
    served.save_pretrained(tmp_path / "theirs")
    assert_same(load_adapter(base(), tmp_path / "theirs"), model)
    options = {"basis": "hadamard", "target_parameters": parameters}
    theirs = with_scales(adapted(base(), linear, 4, **options))
    theirs.save_pretrained(tmp_path / "from PEFT")
    assert_same(load_adapter(base(), tmp_path / "from PEFT"), theirs)


class Normed(Headed):
    """With a head that has buffers, and a module whose name another one ends with."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(40), nn.Linear(40, 3))
        self.norm, self.prenorm = nn.LayerNorm(24), nn.LayerNorm(24)

    def forward(self, x):
        return super().forward(self.norm(self.prenorm(x)))


def test_modules_to_save_from_peft(tmp_path):
    """Buffers, too."""
    model = adapted(Normed(), "ab", basis="hadamard", modules_to_save=["head", "prenorm"])
    shake(model)
    model.train()(torch.randn(50, 24))
    model.save_pretrained(tmp_path)
    served = load_adapter(Normed(), tmp_path)
    assert_same(served, model)
    trained = {name for name, p in served.named_parameters() if p.requires_grad}
    whole = {name for name, _ in Normed().named_parameters() if name.startswith(("head", "pre"))}
    assert {name for name in trained if "randlora_" not in name} == whole
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["base_model.model.head.1.bias"]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="it lacks head.1.bias, though modules_to_save has 'head'"):
        load_adapter(Normed(), tmp_path)


WHOLE = [
    (Headed, ["head"], ["head"]),
    (Normed, ["prenorm", "head.1"], ["head.1", "prenorm"]),
    (Normed, ["prenorm", "norm"], ["prenorm"]),  # PEFT would take "prenorm" for "norm", too
    (Normed, ["norm"], None),
]


@pytest.mark.parametrize("base, whole, listed", WHOLE, ids=str)
def test_modules_to_save_from_ours(tmp_path, base, whole, listed):
    """What PEFT's configuration cannot name it puts into the base model."""
    model = randomize(apply_randlora(base(), ["a", "b"], r=5, modules_to_save=whole))
    shake(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == listed
    accelerated.enable()
    served = opened(tmp_path, base)
    assert_same(served, model)
    assert_same(load_adapter(base(), tmp_path), model)
    with served.disable_adapter(), torch.no_grad():
        is_plain = torch.equal(served(X), base().eval()(X))
    assert is_plain == (listed == sorted(whole))


def test_a_trained_module_whose_weight_is_tied(tmp_path):
    """PEFT would train a copy of it, to which the head would not be tied."""
    base = lambda: llama(tie_word_embeddings=True)  # noqa: E731
    model = randomize(apply_randlora(base(), ["q_proj"], r=4, modules_to_save=["embed_tokens"]))
    shake(model)
    save_adapter(model, tmp_path)
    accelerated.enable()
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        want = model.eval()(tokens).logits
        for served in (opened(tmp_path, base), load_adapter(base(), tmp_path)):
            assert torch.equal(served.eval()(tokens).logits, want)


def test_a_bias_that_was_trained_along(tmp_path):
    model = randomize(apply_randlora(Deep(), ["a", "b"], r=5))
    model.a.base_layer.bias.requires_grad_(True)
    model.c.bias.requires_grad_(True)
    shake(model)
    save_adapter(model, tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    assert {name for name in saved if "bias" in name} == {
        "base_model.model.a.base_layer.bias",
        "base_model.model.c.bias",
    }
    accelerated.enable()
    assert_same(opened(tmp_path), model)
    again = load_adapter(Deep(), tmp_path)
    assert_same(again, model)
    assert again.a.base_layer.bias.requires_grad and not again.b.base_layer.bias.requires_grad


@pytest.mark.parametrize("bias", ["all", "randlora_only"])
def test_biases_from_peft(tmp_path, bias):
    model = adapted(Deep(), "ab", basis="hadamard", bias=bias)
    shake(model)
    model.save_pretrained(tmp_path)
    assert_same(load_adapter(Deep(), tmp_path), model)


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


def test_the_base_weight_of_an_adapted_head_is_not_trained(tmp_path):
    """PEFT saves it, too, if it has the name of an embedding layer."""
    model = adapted(llama(), ["lm_head", "q_proj"], basis="hadamard")
    with torch.no_grad():
        model.get_submodule("base_model.model.lm_head").base_layer.weight.add_(1)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    served = load_adapter(llama(), tmp_path)
    assert not served.lm_head.base_layer.weight.requires_grad
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        assert torch.equal(served(tokens).logits, model.eval()(tokens).logits)


def test_bases_of_peft_are_refused(tmp_path):
    adapted(Deep(), "abc", sparse=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: PEFT draws the bases of this adapter; pef"):
        load_adapter(Deep(), tmp_path)


def test_models_of_peft_are_refused(tmp_path):
    model = adapted(Deep(), "abc", basis="hadamard")
    with pytest.raises(TypeError, match=r"model has layers of PEFT, which has save_pretrained"):
        save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"PeftModel.from_pretrained\(model, folder\)"):
        load_adapter(model, tmp_path, "two")
    accelerated.disable()
    stock = peft.get_peft_model(Deep(), peft.RandLoraConfig(r=4, target_modules=["a"]))
    with pytest.raises(ValueError, match="model has no adapter.*a model of PEFT has save_pret"):
        save_adapter(stock, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
