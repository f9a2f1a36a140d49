"""apply_randlora: which layers it takes, and what it leaves alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from randlora_ext import RandLoraLinear, apply_randlora

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model():
    torch.manual_seed(0)
    block = nn.ModuleDict(
        {"q": nn.Linear(12, 12), "down": nn.Linear(12, 12), "norm": nn.LayerNorm(12)}
    )
    return nn.ModuleDict({"blocks": nn.ModuleList([block, copy.deepcopy(block)])})


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, RandLoraLinear)]


def test_apply_by_suffix_and_by_pattern():
    model = apply_randlora(small_model(), ["q"], r=3, density=0.2, adapter_name="mine")
    assert adapted(model) == ["blocks.0.q", "blocks.1.q"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("randlora_" in name and name.endswith(".mine") for name in trained)
    first, second = (block["q"].bases["mine"] for block in model["blocks"])
    assert first.density == 0.2 and first.packed()[0] is second.packed()[0]

    apply_randlora(model, r"blocks\.1\.d.*", r=4)
    assert adapted(model) == ["blocks.0.q", "blocks.1.q", "blocks.1.down"]
    assert model["blocks"][0]["q"].randlora_lambda["mine"].requires_grad
    assert not model["blocks"][0]["norm"].weight.requires_grad


def test_apply_wraps_a_tied_layer_once():
    model = nn.ModuleDict({"a": nn.Linear(6, 6)})
    model["b"] = model["a"]
    apply_randlora(model, ["a", "b"], r=2)
    assert model["a"] is model["b"] and isinstance(model["a"], RandLoraLinear)


@pytest.mark.parametrize(
    "targets,options,error,message",
    [
        (["k"], {}, ValueError, r"target_modules \['k'\] matches no module .*blocks\.0\.q"),
        ("q", {}, ValueError, "target_modules 'q' matches no module"),
        (["q", "norm"], {}, TypeError, r"'blocks\.0\.norm', matched by target_modules .*LayerNorm"),
        (["q"], {"r": 0}, ValueError, "r must be"),
        (["q"], {"rank": 4}, TypeError, "rank"),
    ],
    ids=str,
)
def test_apply_errors_change_nothing(targets, options, error, message):
    model = small_model()
    with pytest.raises(error, match=message):
        apply_randlora(model, targets, **options)
    assert adapted(model) == []
    assert all(p.requires_grad for p in model.parameters())


def test_training_moves_the_layer_towards_another_one():
    torch.manual_seed(0)
    options = {"r": 1, "density": 1.0, "randlora_alpha": 4}  # enough parameters for any dW
    model = apply_randlora(nn.Sequential(nn.Linear(16, 16)), ["0"], **options)
    x, target = torch.randn(256, 16), torch.randn(16, 16) * 0.25
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(100):
        loss = F.mse_loss(model(x), F.linear(x, target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
