"""RandLoraLinear against the plain PyTorch reference on dense bases."""

import pytest
import torch
from layer_cases import make_basis
from layer_helpers import (
    SHAPES,
    assert_close,
    inputs,
    make_base,
    oracle,
    randomize,
    relative,
    run,
    run_oracle,
    two_adapters,
)
from torch import nn
from torch.nn import functional as F

from randlora_ext import RandLoraLinear
from randlora_ext.reference import delta_weight_reference

pytestmark = pytest.mark.usefixtures("one_thread")
INDEPENDENT = {"r": 5}
HADAMARD = {"r": 7, "basis": "hadamard", "density": None}


@pytest.mark.parametrize(
    "kind, dtype, tolerance",
    [
        (1 / 3, torch.float64, 1e-10),
        (0.07, torch.float32, 1e-5),
        (1.0, torch.float32, 1e-5),
        ("hadamard", torch.float64, 1e-10),
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_reference(shape, kind, dtype, tolerance):
    *features, r = shape
    options = {"basis": kind} if kind == "hadamard" else {"density": kind}
    base = make_base(*features, dtype=dtype)
    layer = randomize(RandLoraLinear(base, r=r, projection_prng_key=5, **options))
    assert layer.bases["default"] == make_basis(*shape, kind, seed=5)
    x, dy = inputs(layer, 3, 7, dtype=dtype)
    assert layer(x).dtype == dtype
    assert_close(run(layer, x, dy), run_oracle(layer, x, dy), tolerance)


@pytest.mark.parametrize("basis", [INDEPENDENT, HADAMARD], ids=["independent", "hadamard"])
@pytest.mark.parametrize("path", ["factored", "delta", "merged"])
@pytest.mark.parametrize("kind", ["linear", "no bias", "subclass", "hook", "conv1d"])
def test_every_kind_of_base_on_every_path(monkeypatch, kind, path, basis):
    monkeypatch.setenv("RANDLORA_PATH", path)
    base = make_base(24, 40, kind, bias=kind != "no bias", dtype=torch.float64)
    calls = []
    if kind == "hook":
        base.register_forward_hook(lambda *_: calls.append(1))
    layer = randomize(RandLoraLinear(base, **basis))
    x, dy = inputs(layer, 11, dtype=torch.float64)
    assert_close(run(layer, x, dy), run_oracle(layer, x, dy), 1e-10)
    assert len(calls) == (kind == "hook")


def test_replaced_forward_is_called():
    base = make_base(8, 6)
    layer = RandLoraLinear(base, r=2)
    base.forward = lambda x: x.new_full((*x.shape[:-1], 6), 7.0)  # as accelerate's offloading does
    assert torch.equal(layer(torch.zeros(3, 8)), torch.full((3, 6), 7.0))


@pytest.mark.parametrize("basis", [INDEPENDENT, HADAMARD], ids=["independent", "hadamard"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_fresh_adapter_changes_nothing(kind, basis):
    base = make_base(24, 40, kind)
    x = torch.randn(5, 24)
    before = base(x)
    layer = RandLoraLinear(base, **basis)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)
    assert not layer.get_delta_weight("default").any()


def test_initial_values_and_attributes():
    layer = RandLoraLinear(nn.Linear(24, 40), r=5, adapter_name="mine")
    assert layer.active_adapters == ["mine"]
    assert layer.num_bases == {"mine": 5} and layer.r == {"mine": 5}
    assert layer.scaling == {"mine": 20.0}  # whatever r
    layer.update_layer("other", r=8, randlora_alpha=100)
    assert layer.scaling.pop("other") == 12.5
    assert not layer.randlora_lambda["mine"].any()
    assert torch.equal(layer.randlora_gamma["mine"], torch.full((5, 24), 1 / 24))
    assert (layer.weight, layer.bias) == (layer.base_layer.weight, layer.base_layer.bias)
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"randlora_lambda.mine", "randlora_gamma.mine"}


@pytest.mark.parametrize("basis", [{"density": 0.07}, {"density": 1 / 3}, HADAMARD], ids=str)
def test_shapes_on_the_meta_device(basis):
    base = make_base(24, 40).to("meta")
    layer = RandLoraLinear(base, **({"r": 8} | basis))
    x = torch.empty(3, 5, 24, device="meta", requires_grad=True)
    y = layer(x)
    assert y.shape == (3, 5, 40) and y.device.type == "meta"
    y.sum().backward()
    lam, gam = layer.adapter_parameters()
    assert [x.grad.shape, lam.grad.shape, gam.grad.shape] == [x.shape, lam.shape, gam.shape]


def test_scaled_bases_and_delta_weight():
    for kind, basis in (("linear", INDEPENDENT), ("conv1d", INDEPENDENT), ("conv1d", HADAMARD)):
        for in_features, out_features in ((24, 40), (40, 24)):
            base = make_base(in_features, out_features, kind, dtype=torch.float64)
            layer = randomize(RandLoraLinear(base, randlora_alpha=128 * basis["r"], **basis))
            lam, gam = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
            A, B = layer.bases["default"].dense(dtype=torch.float64)
            expected = delta_weight_reference(A, B, lam, gam, 128.0, out_features, in_features)
            delta = layer.get_delta_weight("default")
            assert delta.shape == base.weight.shape
            assert relative(delta.T if kind == "conv1d" else delta, expected) < 1e-12
            first, second = layer.get_scaled_bases("default")
            x = torch.randn(3, in_features, dtype=torch.float64)
            part = 128.0 * F.linear(F.linear(x, first), second)
            assert relative(part, F.linear(x, expected)) < 1e-12
            (gradient,) = torch.autograd.grad(delta.sum(), lam)
            (wanted,) = torch.autograd.grad(expected.sum(), lam)
            assert relative(gradient, wanted) < 1e-12


@pytest.mark.parametrize("second", [{}, HADAMARD], ids=["independent", "hadamard"])
def test_two_adapters_add_up(second):
    layer = two_adapters(**second)
    assert layer.active_adapters == ["default"]
    assert not layer.randlora_lambda["two"].requires_grad
    x, dy = inputs(layer, 9, dtype=torch.float64)
    for names in ("default", ["two"], ["default", "two"]):
        layer.set_adapter(names)
        assert_close(run(layer, x, dy), run_oracle(layer, x, dy), 1e-10)
    layer.set_adapter("two")
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"randlora_lambda.two", "randlora_gamma.two"}
    layer.set_adapter([])
    assert torch.equal(layer(x), layer.base_layer(x))


def test_dropout():
    layer = randomize(RandLoraLinear(make_base(24, 40), r=5, randlora_dropout=0.5))
    x = torch.randn(64, 24)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    wanted = layer.base_layer(x) + oracle(layer, dropped)[0] - layer.base_layer(dropped)
    assert relative(y, wanted) < 1e-5
    layer.eval()
    assert relative(layer(x), oracle(layer, x)[0]) < 1e-5
    assert not RandLoraLinear(nn.Linear(4, 4).eval(), randlora_dropout=0.5).training
