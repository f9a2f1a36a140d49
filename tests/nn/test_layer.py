"""RandLoraLinear against plain PyTorch on dense bases: numbers, attributes and errors.

test_state_dict.py has what it saves and loads, test_merge.py and test_unmerge.py how it merges.
"""

import copy

import numpy as np
import pytest
import torch
from layer_cases import run_python
from layer_helpers import (
    adapt,
    assert_right,
    inputs,
    layers,
    make_base,
    oracle,
    pickled,
    randomize,
    relative,
)
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
    return RandLoraLinear(nn.Linear(24, 40), r=5)


def test_the_adapter_is_called_default_and_active(layer):
    assert layer.active_adapters == ["default"] and layer.r == {"default": 5}


@pytest.mark.parametrize("alpha, scaling", [(None, 20.0), (40, 8.0), (0, 0.0)])
def test_the_scaling_is_alpha_by_r_and_20_by_default(alpha, scaling):
    layer = RandLoraLinear(nn.Linear(24, 40), r=5, randlora_alpha=alpha)
    assert layer.scaling == {"default": scaling}


def test_lambda_begins_at_zero_and_gamma_at_a_constant(layer):
    assert not layer.randlora_lambda["default"].any()
    assert torch.equal(layer.randlora_gamma["default"], torch.full((5, 24), 1 / 24))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_diagonals_begin_in_float32_or_wider(dtype):
    layer = RandLoraLinear(make_base(24, 40, dtype=dtype), r=5)
    of = layer.randlora_lambda["default"].dtype, layer.randlora_gamma["default"].dtype
    assert set(of) == {torch.promote_types(dtype, torch.float32)}


def test_weight_and_bias_are_those_of_the_base_layer(layer):
    assert (layer.weight, layer.bias) == (layer.base_layer.weight, layer.base_layer.bias)


def test_lambda_and_gamma_alone_are_trained(layer):
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"randlora_lambda.default", "randlora_gamma.default"}


@BASES
def test_layers_of_equal_sizes_share_their_bases(basis):
    one, two = (RandLoraLinear(nn.Linear(24, 40), r=5, basis=basis) for _ in range(2))
    assert one.bases["default"].packed()[0] is two.bases["default"].packed()[0]


def test_a_disabled_layer_is_its_base_layer(layer):
    randomize(layer)
    x = torch.randn(3, 24)
    with_adapter = layer(x)
    layer.disabled = True
    assert torch.equal(layer(x), layer.base_layer(x)) and "disabled" in repr(layer)
    layer.disabled = False
    assert torch.equal(layer(x), with_adapter) and not torch.equal(layer(x), layer.base_layer(x))


# ---- inside a model ------------------------------------------------------------------------------

COPIES = {"copy": copy.deepcopy, "pickle": lambda model: pickled(model)[0]}


@BASES
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_computes_the_same_and_learns_alone(copied, basis):
    model = randomize(adapt(nn.Sequential(nn.Linear(24, 40)), "0", r=5, basis=basis))
    other, x = copied(model), torch.randn(3, 24)
    y = model(x)
    assert torch.equal(other(x), y)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert torch.equal(model(x), y) and not torch.equal(other(x), y)


@BASES
def test_a_pickle_holds_a_seed_in_place_of_the_bases(basis):
    layer = RandLoraLinear(nn.Linear(512, 512), r=32, basis=basis)
    layer(torch.ones(1, 512))  # packs them
    tensors = sum(p.nbytes for p in (*layer.parameters(), *layer.buffers()))
    assert pickled(layer)[1] < tensors + 20_000  # A and B are 1.1 MB


def test_on_the_meta_device_it_knows_the_shape_of_its_output():
    layer = RandLoraLinear(nn.Linear(24, 40, device="meta"), r=5)
    y = layer(torch.empty(2, 3, 24, device="meta"))
    assert y.is_meta and y.shape == (2, 3, 40)


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_of_torch_calls_the_layers_in_eval_mode_too(padded):
    """Where its fast path is taken it reads the base layers' weights alone."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    names = [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    model = randomize(adapt(copy.deepcopy(encoder), *names, r=4))
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    options = {"src_key_padding_mask": mask} if padded else {}
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        want = model.train()(x, **options)
        torch.testing.assert_close(model.eval()(x, **options), want)
        assert (want - encoder(x, **options)).abs().max() > 0.1


def test_a_rank_beyond_the_features_is_told_at_the_caller():
    with pytest.warns(UserWarning, match=r"r = 9 is more than min.* = 8, with which") as caught:
        RandLoraLinear(nn.Linear(8, 12), r=9)
    assert [w.filename for w in caught] == [__file__]


def test_layers_trained_on_a_model_without_peft():
    """As docs/train.md shows it."""
    model = adapt(nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 3)), "0", "2", r=2)
    assert [*layers(model)] == ["0", "2"]
    x, target = torch.randn(64, 24), torch.randint(3, (64,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    after = [p for p in model.parameters() if not p.requires_grad]
    assert len(frozen) == 4 and all(map(torch.equal, after, frozen))


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
    ({"r": 0}, ValueError, "r must be a Python integer in \\[1, 65536\\], got 0"),
    ({"density": 0.3, "basis": "hadamard"}, ValueError, "density must be None for Hadamard bases"),
    ({"basis": "indep"}, ValueError, "^basis must be .*'indep'; did you mean 'independent'"),
    ({"randlora_dropout": 1.0}, ValueError, r"randlora_dropout must .* in \[0, 1\), got 1\.0"),
    ({"randlora_dropout": "x"}, TypeError, r"randlora_dropout .*'x'"),
    *(
        ({"randlora_alpha": value}, ValueError, "randlora_alpha must be a finite number")
        for value in (float("inf"), float("nan"), -(10**400))
    ),
    ({"randlora_alpha": "640"}, TypeError, r"randlora_alpha .*'640'"),
    ({"r": np.int64(4)}, TypeError, r"r must be a Python integer in .*, got np\.int64\(4\)"),
    ({"seed": -1}, ValueError, r"seed must be a Python integer in .*, got -1"),
    ({"basis": "peft"}, ValueError, "^basis must be .*got 'peft'"),
    ({"adapter_name": "mine"}, TypeError, "got an .* argument 'adapter_name'"),
]


@pytest.mark.parametrize("options, error, message", BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_a_layer_of_bad_options_leaves_its_base_layer(options, error, message):
    base = nn.Linear(8, 8)
    with pytest.raises(error, match=message):
        RandLoraLinear(base, **options)
    assert base.weight.requires_grad


def test_inputs_of_integers(layer):
    with pytest.raises(RuntimeError, match="dtype"):  # as nn.Linear
        layer(torch.zeros(3, 24, dtype=torch.int64))


def test_inputs_of_another_size(layer):
    with pytest.raises(RuntimeError, match=r"in_features = 24, got \(3, 7\)"):
        layer(torch.zeros(3, 7))


METHODS = {
    "get_delta_weight": lambda layer: layer.get_delta_weight("x"),
    "set_input_scale": lambda layer: layer.set_input_scale("x", torch.ones(1)),
    "is_calibrated": lambda layer: layer.is_calibrated("x"),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_does_not_exist(layer, method):
    with pytest.raises(ValueError, match=r"adapter must be one of \['default'\], got 'x'"):
        METHODS[method](layer)


@pytest.mark.parametrize(
    "module", [nn.Conv1d(4, 4, 1), nn.LazyLinear(4), None, torch.compile(nn.Linear(4, 4))], ids=str
)
def test_base_layers_that_are_not_linear(module):
    with pytest.raises(TypeError, match="base_layer must be an nn.Linear or a transformers"):
        RandLoraLinear(module)


def test_a_layer_that_has_an_adapter_takes_no_other(layer):
    with pytest.raises(TypeError, match="base_layer"):
        RandLoraLinear(layer)


def test_a_layer_without_features():
    base = nn.Linear(8, 0)
    with pytest.raises(ValueError, match="out_features must be"):
        RandLoraLinear(base)
    assert base.weight.requires_grad
