"""What torch.set_default_dtype chooses is the dtype of nobody's adapter."""

import copy

import pytest
import torch
from input_scale_nets import calibrated, layer_of, net
from layer_cases import basis_arguments, by_plain_torch, delta_by_reference, exact, make_layer
from layer_helpers import assert_right, inputs, make_base, randomize, relative, uneven
from torch import nn

from randlora_ext import RandLoraLinear, calibrate
from randlora_ext.diagnostics import self_check
from randlora_ext.ops import hadamard


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default(request):
    """While the test runs, another default than float32; the models are float32 all the same."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


KINDS = {
    "hadamard": {"basis": "hadamard"},
    "lists": {"density": 0.07},
    "planes": {"density": 1 / 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_forward_and_gradients(default, kind, dtype):
    layer = randomize(RandLoraLinear(make_base(24, 40, dtype=dtype), r=5, **KINDS[kind]))
    limit = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert_right(layer, *inputs(layer, 7, dtype=dtype), limit)


def test_a_new_adapter_is_the_same(default):
    layer = RandLoraLinear(make_base(24, 40), r=5)
    torch.set_default_dtype(torch.float32)
    want = RandLoraLinear(make_base(24, 40), r=5).state_dict()
    got = layer.state_dict()
    assert got.keys() == want.keys()
    for key in [key for key in want if not key.startswith("base_layer.")]:
        assert got[key].dtype == want[key].dtype and torch.equal(got[key], want[key]), key


@pytest.mark.parametrize("assign", [False, True])
def test_a_calibrated_scale_comes_back_bit_for_bit(default, assign):
    torch.set_default_dtype(torch.float32)
    source = calibrated()
    torch.set_default_dtype(default)
    other = net().float()
    other.load_state_dict(source.state_dict(), assign=assign)
    for name in ("one", "two"):
        scale, own = (getattr(m, name).randlora_input_scale["default"] for m in (other, source))
        assert scale.dtype == torch.float32 and torch.equal(scale, own)
    x = uneven(3).float()
    assert torch.equal(other.eval()(x), source.eval()(x))


def test_calibrating(default):
    torch.set_default_dtype(torch.float32)
    source, batch = net(), uneven(40)
    other = copy.deepcopy(source)
    calibrate(source, [batch])
    torch.set_default_dtype(default)
    calibrate(other, [batch])
    for name in ("one", "two"):
        scale, want = (getattr(m, name).randlora_input_scale["default"] for m in (other, source))
        assert scale.dtype == torch.float32 and relative(scale, want) < 1e-6


def test_merging_and_unmerging(default):
    layer = randomize(layer_of(basis="hadamard").float())
    W, total = layer.weight.clone(), (layer.weight + layer.get_delta_weight("default")).detach()
    layer.merge()
    assert layer.weight.dtype == torch.float32 and torch.equal(layer.weight, total)
    layer.unmerge()
    assert torch.equal(layer.weight, W)


def test_hadamard_bases_in_plain_torch(default):
    """On devices without our kernels."""
    layer = make_layer(24, 40, 5, "hadamard", 7, torch.float32)
    want = exact(layer)
    for name, got in by_plain_torch(layer).items():
        assert got.dtype == torch.float32 and relative(got, want[name]) < 1e-5, name
    merged = hadamard._plain_weight(layer.weight, layer.lam, layer.gam, *basis_arguments(layer))
    delta = delta_by_reference(layer.basis, layer.lam, layer.gam, layer.scaling)
    assert merged.dtype == torch.float32 and relative(merged, layer.weight + delta) < 1e-5


def test_the_check_of_the_kernels(default):
    wrong = [what for what, error, limit in self_check() if not error <= limit]
    assert wrong == []


# ---- under PEFT ----------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [False, True])
def test_a_saved_adapter_comes_back_bit_for_bit(default, low, tmp_path):
    helpers = pytest.importorskip("peft_helpers")
    torch.set_default_dtype(torch.float32)
    base = helpers.Deep()
    model = helpers.made(base=lambda: copy.deepcopy(base), basis="hadamard")
    for layer in helpers.layers(model):
        layer.set_input_scale("default", torch.rand(layer.in_features) + 0.5)
    model.save_pretrained(tmp_path)
    torch.set_default_dtype(default)
    opened = helpers.opened(tmp_path, lambda: base, low_cpu_mem_usage=low)
    for got, want in zip(helpers.layers(opened), helpers.layers(model), strict=True):
        for part in ("randlora_lambda", "randlora_gamma", "randlora_input_scale"):
            one, two = getattr(got, part)["default"], getattr(want, part)["default"]
            assert one.dtype == torch.float32 and torch.equal(one, two), part
    x = torch.randn(5, 24, dtype=torch.float32)
    assert torch.equal(opened(x), model(x))


@pytest.mark.parametrize("kind", ["hadamard", "independent", "peft"])
def test_an_adapter_of_peft_computes_what_its_update_says(default, kind):
    helpers = pytest.importorskip("peft_helpers")
    base = nn.Sequential(make_base(24, 40))
    model = helpers.adapted(base, ["0"], basis=kind)
    (layer,) = helpers.layers(model)
    assert layer.randlora_lambda["default"].dtype == torch.float32
    x = torch.randn(5, 24, dtype=torch.float32)
    W = layer.weight.double() + layer.get_delta_weight("default").double()
    y = model(x)
    assert y.dtype == torch.float32
    assert relative(y, x.double() @ W.T + layer.base_layer.bias.double()) < 1e-5


def test_experts_under_peft(default):
    helpers = pytest.importorskip("mergeable")
    made = helpers.OfExperts(torch.float32)
    made.layer.set_input_scale("default", torch.rand(24) + 0.5)
    scale = made.layer.randlora_input_scale["default"]
    assert scale.dtype == torch.float32
    y = made.model(x := torch.randn(3, 24, dtype=torch.float32))
    made.merge()
    assert y.dtype == torch.float32 and relative(made.model(x), y) < 1e-5
