"""`calibrate`: the vector that it computes from batches, and what it refuses.

test_input_scale.py and test_input_scale_state.py have what becomes of that vector.
"""

import statistics

import pytest
import torch
from input_scale_nets import Net, layer_of, net
from layer_helpers import (
    adapt,
    input_scale_of,
    normalized,
    randomize,
    relative,
    uneven,
)
from torch import nn

from randlora_ext import RandLoraLinear, calibrate, calibration
from randlora_ext.batches import moved_to

SHAPES_OF_A_BATCH = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x,),
    "mapping": lambda x: {"x": x},
}


@pytest.mark.parametrize("shape", SHAPES_OF_A_BATCH)
def test_the_vector_is_that_of_the_formula(shape):
    model = net()
    seen = {"one": [], "two": []}  # all inputs of each layer
    for name, inputs in seen.items():
        getattr(model, name).register_forward_pre_hook(lambda _, x, at=inputs: at.append(x[0]))
    batches = map(SHAPES_OF_A_BATCH[shape], [uneven(3, 7), uneven(5, 7, seed=1)])
    calibrate(model, batches)
    assert len(seen["one"]) == 4  # twice a batch
    for name, inputs in seen.items():
        scale = getattr(model, name).randlora_input_scale["default"]
        assert relative(normalized(scale), input_scale_of(*inputs)) < 1e-6


def test_every_module_is_left_in_its_mode():
    model = net().train()
    model.one.eval()
    modes = [module.training for module in model.modules()]
    calibrate(model, [uneven(3, 7)])
    assert [module.training for module in model.modules()] == modes


def test_dropout_does_not_act():
    model, in_eval_mode = net().train(), net().eval()
    for each in (model, in_eval_mode):
        calibrate(each, [uneven(3, 7)])
    scales = [each.one.randlora_input_scale["default"] for each in (model, in_eval_mode)]
    assert torch.equal(*scales)


def test_a_second_calibration_replaces_the_first():
    model, once = net(), net()
    calibrate(model, [uneven(3, 7), uneven(5, 7, seed=1)])
    first = model.one.randlora_input_scale["default"].clone()
    calibrate(model, [uneven(3, 7)])
    calibrate(once, [uneven(3, 7)])
    second, only = (each.one.randlora_input_scale["default"] for each in (model, once))
    assert torch.equal(second, only) and not torch.equal(second, first)


def test_features_that_vary_little_count_little_and_none_is_lost():
    x = uneven(50)
    x[:, 5] = x[:, 5] / 100 + 3
    x[:, 6] = 7
    layer = layer_of(basis="hadamard")
    calibrate(layer, [x])
    scale = layer.randlora_input_scale["default"]
    assert relative(normalized(scale), input_scale_of(x)) < 1e-6
    median = scale.median()
    assert scale[5] == scale[6] == scale.min() and scale[6] == pytest.approx(median / 1000)


TOKENS = {
    "no dimension of tokens": lambda x: x,
    "one token": lambda x: x[None],
    "six tokens": lambda x: x.expand(2, 3, 24),
}


@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens_that_are_all_alike(tokens):
    """Which features vary cannot be known, so their size alone counts."""
    x, layer = uneven(), layer_of(basis="hadamard")
    calibrate(layer, [TOKENS[tokens](x)])
    want = 1 / (x.abs() + 0.1 * x.abs().median())
    scale = layer.randlora_input_scale["default"]
    assert relative(normalized(scale), normalized(want)) < 1e-6


def test_own_text_in_which_nothing_else_varies_is_left_out():
    rms, in_batches = uneven(1)[0].abs(), torch.tensor([1.0, 0.5, 0] * 8)
    want = calibration.profile_of(rms, in_batches)
    for in_own_text in (1 - in_batches.ceil(), torch.zeros(24)):
        assert torch.equal(calibration.profile_of(rms, in_batches, in_own_text), want)
    assert not torch.equal(calibration.profile_of(rms, in_batches, rms / rms.max()), want)


def test_zeros_in_most_features_leave_their_vector_finite():
    layer = layer_of(basis="hadamard")
    calibrate(layer, [torch.tensor([0.0, 0, 0, 2, 4]).repeat(5)[None, :24]])
    scale = layer.randlora_input_scale["default"]
    assert scale.isfinite().all() and float(scale.max() / scale.min()) < 30


@pytest.fixture
def padded(monkeypatch):
    """A calibrated model of one layer, and the tokens that the mask leaves of its batch."""
    monkeypatch.setattr(Net, "forward", lambda self, x, attention_mask: self.one(x))
    model = adapt(Net(), "one", r=5, basis="hadamard")
    x, mask = uneven(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :4] = 0
    calibrate(model, [{"x": x, "attention_mask": mask}])
    return model, x[mask != 0]


def test_a_mask_of_another_order_of_dimensions_leaves_nothing_out(monkeypatch):
    """A model that takes (tokens, batch, features), of which (batch, tokens) says nothing."""
    monkeypatch.setattr(Net, "forward", lambda self, x, attention_mask: self.one(x))
    model = adapt(Net(), "one", r=5, basis="hadamard")
    x, mask = uneven(7, 2), torch.ones(2, 7)
    mask[0, :4] = 0
    calibrate(model, [{"x": x, "attention_mask": mask}])
    scale = model.one.randlora_input_scale["default"]
    assert relative(normalized(scale), input_scale_of(x)) < 1e-6


@pytest.mark.parametrize("mask", [{"full": torch.zeros(2, 7)}, torch.zeros(2, 1, 7, 7)])
def test_a_mask_of_another_form_is_told_and_leaves_nothing_out(monkeypatch, mask):
    monkeypatch.setattr(Net, "forward", lambda self, x, attention_mask: self.one(x))
    model = adapt(Net(), "one", r=5, basis="hadamard")
    with pytest.warns(UserWarning, match=r"attention_mask is no tensor \(batch, tokens\)"):
        calibrate(model, [{"x": uneven(2, 7), "attention_mask": mask}])
    assert model.one.is_calibrated("default")


def test_a_batch_stays_where_it_is_beside_offloaded_parameters():
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    batch = {"x": torch.ones(2), "masks": [torch.zeros(2)], "name": "a"}
    moved = moved_to(model, batch)
    assert moved == {"x": batch["x"], "masks": batch["masks"], "name": "a"}
    assert moved["masks"][0].device.type == "cpu"


def test_padding_is_left_out_of_the_vector(padded):
    model, kept = padded
    scale = model.one.randlora_input_scale["default"]
    assert relative(normalized(scale), input_scale_of(kept)) < 1e-6


def test_padding_is_left_out_of_its_strength(padded):
    model, kept = padded
    scale = model.one.randlora_input_scale["default"]
    assert response(scale, kept, model.one(kept)) == pytest.approx(1.5, rel=1e-5)


def response(scale, x, y):
    """Of a layer to a random update: what it would change over the layer's own outputs."""
    return float(((x * scale).square().sum() / y.detach().square().mean(1).sum()).sqrt())


@pytest.mark.parametrize("names", [["one", "two"], ["two"], ["one", "two", "three"]])
def test_the_median_layer_of_every_model_responds_equally(names):
    torch.manual_seed(0)
    layers = {"one": nn.Linear(24, 40), "two": nn.Linear(40, 24), "three": nn.Linear(24, 90)}
    with torch.no_grad():
        layers["two"].weight *= 30  # a layer that responds little goes on doing so
    model = nn.Sequential(*(layers[name] for name in ("one", "two", "three")))
    places = [str(["one", "two", "three"].index(name)) for name in names]
    adapt(model, *places, r=5, basis="hadamard")
    seen = {}
    for at in places:
        model[int(at)].register_forward_hook(lambda _, x, y, at=at: seen.update({at: (x[0], y)}))
    calibrate(model, [uneven(50)])
    responses = [
        response(model[int(at)].randlora_input_scale["default"], *seen[at]) for at in places
    ]
    assert statistics.median(responses) == pytest.approx(1.5, rel=1e-5)
    assert len(names) == 1 or max(responses) > 2 * min(responses)


def test_a_layer_whose_outputs_are_zero_has_no_strength_of_its_own():
    model = net()
    with torch.no_grad():
        model.two.base_layer.weight.zero_()
        model.two.base_layer.bias.zero_()
    calibrate(model, [uneven(50)])
    assert model.two.is_calibrated("default") and model.one.is_calibrated("default")
    for layer in (model.one, model.two):
        assert layer.randlora_input_scale["default"].isfinite().all()


def test_only_adapters_on_hadamard_bases():
    layers = nn.Sequential(layer_of(density=0.3), layer_of(40, basis="hadamard"))
    assert [*calibrate(layers, [uneven(9)])] == ["1"]
    assert layers[1].is_calibrated("default")


def merged():
    layer = layer_of(basis="hadamard")
    layer.merge()
    return layer


def disabled():
    layer = layer_of(basis="hadamard")
    layer.disabled = True
    return layer


X = uneven(9)
NO_ADAPTER = "no active adapter on Hadamard bases"
ONE_BATCH = "batches must be several, such as .batch., got one tensor or mapping"
NO_BATCHES = "batches must be several, such as .batch., got ('abc'|None|3)"
WRONG_BATCH = "batches must hold what the model takes.*, got ('hello'|None)"
REFUSED = {
    "independent bases": (lambda: layer_of(density=0.3), [X], NO_ADAPTER),
    "disabled": (disabled, [X], NO_ADAPTER),
    "no adapter": (lambda: nn.Linear(24, 2), [X], NO_ADAPTER),
    "merged": (merged, [X], "adapter 'default' of layer '' is merged"),
    "trained": (
        lambda: randomize(layer_of(basis="hadamard")), [X], "has trained .its lambda is not zero"
    ),
    "frozen": (lambda: layer_of(basis="hadamard").requires_grad_(False), [X], NO_ADAPTER),
    "meta": (lambda: layer_of(basis="hadamard").to("meta"), [X], "lambda of layer '' has no num"),
    "no batch": (lambda: layer_of(basis="hadamard"), [], "at least one batch, got none"),
    "NaN": (net, [X, X.log()], "the inputs or outputs of layer 'one' hold NaN or infinity"),
    "one tensor": (net, X, ONE_BATCH),
    "one mapping": (net, {"x": X}, ONE_BATCH),
    "a text": (net, "abc", NO_BATCHES),
    "None": (net, None, NO_BATCHES),
    "a number": (net, 3, NO_BATCHES),
    "batch of text": (net, ["hello"], WRONG_BATCH),
    "second batch of text": (net, [X, "hello"], WRONG_BATCH),
    "batch of None": (net, [None], WRONG_BATCH),
    "no model": (lambda: None, [X], "model must be an nn.Module, got None"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_changes_nothing(case):
    make, batches, message = REFUSED[case]
    model = make()
    with pytest.raises((ValueError, TypeError), match=message):
        calibrate(model, batches)
    modules = [] if model is None else model.modules()
    layers = [m for m in modules if isinstance(m, RandLoraLinear)]
    assert not any(layer.is_calibrated("default") for layer in layers)
    assert not any(layer._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize("tokens", [3, 0])
def test_a_layer_that_sees_only_zeros_or_nothing_stays_as_it_is(tokens):
    model = nn.Sequential(layer_of(basis="hadamard"))
    with pytest.warns(UserWarning, match=r"to 1 of 1 layers, .* stay as they were: \['0'\]"):
        calibrate(model, [torch.zeros(tokens, 24)])
    assert not model[0].is_calibrated("default")


def test_a_model_of_which_everything_is_masked_stays_as_it_is():
    masked, x = net(), uneven(2, 7)
    with pytest.warns(UserWarning, match="batches brought no token") as warned:
        calibrate(masked, [{"x": x, "attention_mask": torch.zeros(2, 7)}])
    assert len(warned) == 1 and "to 2 of 2 layers" in str(warned[0].message)
    assert not masked.one.is_calibrated("default")
