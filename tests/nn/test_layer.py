"""RandLoraLinear against plain PyTorch on dense bases: numbers, dtypes, state and errors."""

import pytest
import torch
from layer_cases import run_python
from layer_helpers import assert_right, inputs, make_base, oracle, randomize, relative
from torch import nn
from torch.nn import functional as F

from randlora_ext import RandLoraLinear

BASES = pytest.mark.parametrize("basis", ["independent", "hadamard"])
LAYER_TYPES = pytest.mark.parametrize("layer_type", ["linear", "no bias", "subclass", "conv1d"])


def over(layer_type, basis):
    base = make_base(24, 40, layer_type, bias=layer_type != "no bias", dtype=torch.float64)
    return RandLoraLinear(base, r=7, basis=basis)


@BASES
@LAYER_TYPES
def test_a_new_adapter_changes_nothing_yet(layer_type, basis):
    layer = over(layer_type, basis)
    x, _ = inputs(layer, 11, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not layer.get_delta_weight("default").any()


@BASES
@LAYER_TYPES
def test_outputs_and_gradients_are_those_of_the_reference(layer_type, basis):
    layer = randomize(over(layer_type, basis))
    assert_right(layer, *inputs(layer, 11, dtype=torch.float64), 1e-10)


@BASES
@LAYER_TYPES
def test_the_update_is_what_is_added_to_the_weight(layer_type, basis):
    layer = randomize(over(layer_type, basis))
    x, _ = inputs(layer, 11, dtype=torch.float64)
    delta = layer.get_delta_weight("default")
    weight = layer.weight + delta
    if layer_type == "conv1d":
        weight = weight.T
    assert delta.requires_grad and relative(layer(x), F.linear(x, weight, layer.bias)) < 1e-10


def hook(base, calls):
    base.register_forward_hook(lambda *_: calls.append(1))


def replace_forward(base, calls):
    """As accelerate's offloading does."""
    base.forward = lambda x, forward=base.forward: calls.append(1) or forward(x)


@BASES
@pytest.mark.parametrize("change", [hook, replace_forward])
def test_a_changed_base_layer_is_called(change, basis):
    layer, calls = randomize(over("linear", basis)), []
    change(layer.base_layer, calls)
    assert_right(layer, *inputs(layer, 11, dtype=torch.float64), 1e-10)
    assert len(calls) == 1


# ---- attributes ----------------------------------------------------------------------------------


@pytest.fixture
def layer():
    return RandLoraLinear(nn.Linear(24, 40), r=5, adapter_name="mine")


def test_the_first_adapter_is_active(layer):
    assert layer.active_adapters == ["mine"] and layer.r == {"mine": 5}


def test_the_scaling_is_alpha_by_r_and_20_by_default(layer):
    assert layer.scaling == {"mine": 20.0}
    layer.update_layer("other", r=8, randlora_alpha=100)
    assert layer.scaling == {"mine": 20.0, "other": 12.5}


def test_lambda_begins_at_zero_and_gamma_at_a_constant(layer):
    assert not layer.randlora_lambda["mine"].any()
    assert torch.equal(layer.randlora_gamma["mine"], torch.full((5, 24), 1 / 24))


def test_weight_and_bias_are_those_of_the_base_layer(layer):
    assert (layer.weight, layer.bias) == (layer.base_layer.weight, layer.base_layer.bias)


def test_lambda_and_gamma_alone_are_trained(layer):
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"randlora_lambda.mine", "randlora_gamma.mine"}


# ---- dropout -------------------------------------------------------------------------------------


@pytest.fixture
def dropping():
    return randomize(RandLoraLinear(make_base(24, 40), r=5, randlora_dropout=0.5))


def test_dropout_acts_on_the_inputs_of_the_adapter(dropping):
    x = torch.randn(64, 24)
    torch.manual_seed(3)
    y = dropping(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    wanted = dropping.base_layer(x) + oracle(dropping, dropped)[0] - dropping.base_layer(dropped)
    assert relative(y, wanted) < 1e-5


def test_dropout_does_not_act_in_eval_mode(dropping):
    x = torch.randn(64, 24)
    assert relative(dropping.eval()(x), oracle(dropping, x)[0]) < 1e-5


def test_a_layer_takes_the_mode_of_its_base_layer():
    assert not RandLoraLinear(nn.Linear(4, 4).eval(), randlora_dropout=0.5).training


# ---- what the layer says to bad input ------------------------------------------------------------


def test_core_needs_torch_alone():
    apart = {"peft", "transformers", "numpy.f2py"}
    run_python("-c", f"import sys, randlora_ext; assert not {apart} & {{*sys.modules}}")


BAD_OPTIONS = [
    ({"alpha": 16}, TypeError, "got an .* argument 'alpha'"),
    ({"r": 0}, ValueError, "r must be an integer in \\[1, 65536\\], got 0"),
    ({"density": 0.3, "basis": "hadamard"}, ValueError, "density must be None for Hadamard bases"),
    ({"basis": "indep"}, ValueError, "^basis must be .*'indep'; did you mean 'independent'"),
    ({"randlora_dropout": 1.0}, ValueError, r"randlora_dropout must .* in \[0, 1\), got 1\.0"),
    ({"randlora_dropout": "x"}, TypeError, r"randlora_dropout .*'x'"),
    *(
        ({"randlora_alpha": value}, ValueError, "randlora_alpha must be a finite number")
        for value in (float("inf"), float("nan"), -(10**400))
    ),
    ({"randlora_alpha": "640"}, TypeError, r"randlora_alpha .*'640'"),
    *(({"adapter_name": n}, ValueError, f"adapter_name .*'{n}'") for n in ("", "a.b", "keys")),
    ({"adapter_name": 3}, TypeError, r"adapter_name .*3"),
]


EVERY_BAD = pytest.mark.parametrize("options,error,message", BAD_OPTIONS, ids=lambda v: str(v)[:40])


@EVERY_BAD
def test_a_layer_of_bad_options_leaves_its_base_layer(options, error, message):
    base = nn.Linear(8, 8)
    with pytest.raises(error, match=message):
        RandLoraLinear(base, **options)
    assert base.weight.requires_grad


@EVERY_BAD
def test_an_adapter_of_bad_options_changes_nothing(options, error, message):
    layer = RandLoraLinear(nn.Linear(8, 8), r=2)
    keys = set(layer.state_dict())
    with pytest.raises(error, match=message):
        layer.update_layer(**{"adapter_name": "other", **options})
    assert set(layer.state_dict()) == keys and list(layer.bases) == ["default"]


def test_inputs_of_integers(layer):
    with pytest.raises(RuntimeError, match="dtype"):  # as nn.Linear
        layer(torch.zeros(3, 24, dtype=torch.int64))


def test_inputs_of_another_size(layer):
    with pytest.raises(RuntimeError, match=r"in_features = 24, got \(3, 7\)"):
        layer(torch.zeros(3, 7))


@pytest.mark.parametrize("method", ["set_adapter", "get_delta_weight"])
def test_an_adapter_that_does_not_exist(layer, method):
    with pytest.raises(ValueError, match=r"adapter.* must be one of \['mine'\], got 'x'"):
        getattr(layer, method)("x")
    assert layer.active_adapters == ["mine"]


def test_an_adapter_cannot_be_active_twice(layer):
    with pytest.raises(ValueError, match="must not repeat"):
        layer.set_adapter(["mine", "mine"])
    assert layer.active_adapters == ["mine"]


@pytest.mark.parametrize("module", [nn.Conv1d(4, 4, 1), nn.LazyLinear(4), None], ids=str)
def test_base_layers_that_are_not_linear(module):
    with pytest.raises(TypeError, match="base_layer must be an nn.Linear or a transformers"):
        RandLoraLinear(module)


@pytest.mark.parametrize(
    "key", ["base_layer.weight", "randlora_lambda.mine", "randlora_input_scale.mine"]
)
def test_a_state_dict_with_texts(layer, key):
    with pytest.raises(RuntimeError, match=f"{key} must be a tensor, got str"):
        layer.load_state_dict({**layer.state_dict(), key: "text"})
