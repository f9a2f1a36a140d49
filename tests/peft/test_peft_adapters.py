"""randlora_ext.peft: several adapters, and merging them."""

import copy
import pickle

import peft
import pytest
import torch
from peft_helpers import (
    PEFT,
    Deep,
    accelerated,
    adapted,
    config,
    layers,
    made,
    opened,
    pair,
    randomize,
    relative,
)
from torch import nn

from randlora_ext import RandLoraLinear

OTHERS = [
    (3, {"sparse": True}),
    (11, {}),
    (5, {"density": 0.2, "projection_prng_key": 3}),
    (3, {"basis": "hadamard", "projection_prng_key": 2}),
]


class Two:
    """A saved model of two adapters, and the output of each."""

    def __init__(self, r, options, folder, x):
        saves_projection = "projection_prng_key" not in options
        self.model = made(sparse=True, save_projection=saves_projection)
        self.model.add_adapter("two", config(r, accelerated.RandLoraConfig, **options))
        randomize(self.model)
        self.outputs = outputs(self.model, x)
        self.model.save_pretrained(folder)


def outputs(model, x):
    found = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        found[name] = model(x)
    return found


@pytest.fixture(params=OTHERS, ids=str)
def two(request, tmp_path, x):
    return Two(*request.param, tmp_path, x)


def test_an_adapter_of_another_rank_key_or_kind_is_what_it_is_alone(two, tmp_path, x):
    """Stock PEFT wants one key and one save_projection for all."""
    assert torch.equal(opened(tmp_path / "two")(x), two.outputs["two"])


def test_an_adapter_of_another_rank_key_or_kind_is_loaded_beside_the_first(two, tmp_path, x):
    both = opened(tmp_path)
    both.load_adapter(tmp_path / "two", "two")
    for name, y in outputs(both, x).items():
        assert torch.equal(y, two.outputs[name])


def test_two_active_adapters_are_summed(two, x):
    two.model.base_model.set_adapter(["default", "two"])
    both = two.model(x)
    with two.model.disable_adapter():
        base = two.model(x)
    assert relative(two.model.base_model.model.a(x), sum_of_adapters(two.model, x)) < 1e-5
    assert not torch.equal(both, base)


def sum_of_adapters(model, x):
    """Of the first layer."""
    layer = model.base_model.model.a
    y = layer.base_layer(x)
    for name in ("default", "two"):
        y = y + x @ layer.get_delta_weight(name).T
    return y


@pytest.mark.skipif(PEFT < (0, 21, 2), reason="PEFT restores it since 0.21.2")
def test_what_is_frozen_stays_frozen_when_an_adapter_is_added():
    model = made(basis="hadamard")
    for layer in layers(model):
        layer.randlora_gamma["default"].requires_grad_(False)
    model.add_adapter("two", model.peft_config["default"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 and all(name.endswith("_lambda.default") for name in trained)


def test_adapters_on_bases_of_peft_have_one_key_as_in_stock():
    model = made(sparse=True)
    with pytest.raises(ValueError, match="PRNG initialisation key must be the same"):
        model.add_adapter("four", config(5, sparse=True, projection_prng_key=9))


def test_bases_that_are_larger_than_an_adapter_needs_are_told():
    """Its file, alone, would have smaller ones."""
    model = made(targets="abc")
    with pytest.warns(UserWarning, match="adapter 'default', which are larger .* and not alone"):
        model.add_adapter("fewer", config(5, targets=["a"]))


def test_bases_of_the_right_size_are_shared_silently(recwarn):
    for options in ({}, {"basis": "hadamard"}):
        model = made(targets="abc", randlora_alpha=80, **options)
        model.add_adapter("two", model.peft_config["default"])
    assert not [each for each in recwarn if "shares those of" in str(each.message)]


# ---- merging -------------------------------------------------------------------------------------


class Merging:
    """Two adapters, on stock PEFT and on ours, and some of them to merge."""

    def __init__(self, options, names, safe, x):
        self.stock, self.ours = pair(Deep(), lambda: config(5, **options))
        self.names, self.safe = names, safe
        for model in (self.stock, self.ours):
            model.add_adapter("two", config(5, **options, randlora_alpha=100))
            randomize(model, seed=4)
        self.ours.base_model.set_adapter(names or ["default"])
        self.before = self.ours(x)

    def merge(self):
        for model in (self.stock, self.ours):
            model.merge_adapter(adapter_names=self.names, safe_merge=self.safe)


@pytest.fixture(params=[(True, {"sparse": True}), (False, {})], ids=["sparse", "uniform"])
def safe_and_options(request):
    return request.param


@pytest.fixture(params=[["two"], ["default", "two"], ["two", "default"], None], ids=str)
def merging(request, safe_and_options, x):
    safe, options = safe_and_options
    return Merging(options, request.param, safe, x)


def test_merged_weights_are_those_of_stock(merging):
    merging.merge()
    for mine, theirs in zip(layers(merging.ours), layers(merging.stock), strict=True):
        assert mine.merged_adapters == theirs.merged_adapters == (merging.names or ["default"])
        assert mine.merged and relative(mine.weight, theirs.weight) < 1e-6


def test_a_merged_model_computes_what_the_adapters_did(merging, x):
    merging.merge()
    assert relative(merging.ours(x), merging.before) < 1e-5


def test_unmerging_restores_every_bit(merging, x):
    weights = [layer.weight.clone() for layer in layers(merging.ours)]
    merging.merge()
    merging.ours.unmerge_adapter()
    for layer, weight in zip(layers(merging.ours), weights, strict=True):
        assert torch.equal(layer.weight, weight)
    assert relative(merging.ours(x), merging.before) < 1e-5


def test_disabling_unmerges(merging, x):
    merging.merge()
    with merging.ours.disable_adapter():
        assert relative(merging.ours(x), Deep()(x)) < 1e-5


def test_merge_and_unload_as_stock(merging, x):
    models = merging.ours, merging.stock
    ours, stock = (model.merge_and_unload(adapter_names=merging.names) for model in models)
    assert not layers(ours) and relative(ours(x), stock(x)) < 1e-5


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_of_a_model_merges_all_layers_or_none(method, x):
    model = made(basis="hadamard")
    *earlier, last = layers(model)
    weights = [layer.weight.clone() for layer in (*earlier, last)]
    broken = last.randlora_lambda["default"].data[0, :1]
    was = broken.clone()
    broken.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaNs detected .* nothing was changed"):
        getattr(model, method)(safe_merge=True)
    assert layers(model) == [*earlier, last] and not any(layer.merged for layer in layers(model))
    for layer, weight in zip(layers(model), weights, strict=True):
        assert torch.equal(layer.weight, weight)
    broken.copy_(was)
    want = model(x)
    merged = getattr(model, method)(safe_merge=True) or model
    assert relative(merged(x), want) < 1e-5


def test_a_model_is_adapted_and_merged_again_while_an_old_layer_is_referred_to(x):
    model = made(basis="hadamard")
    old = layers(model)
    again = adapted(model.merge_and_unload(), "abc", basis="hadamard")
    want = again(x)
    assert relative(again.merge_and_unload()(x), want) < 1e-5
    assert all(layer.merged for layer in old)


# ---- bases of adapters that are added, replaced or fail ------------------------------------------


def made_over(net, **options):
    chosen = config(5, accelerated.RandLoraConfig, "0", **options)
    (layer,) = layers(randomize(peft.get_peft_model(net, chosen)))
    return layer


@pytest.fixture(params=[{"basis": "hadamard"}, {"density": 0.5}, {"sparse": True}], ids=str)
def second(request):
    """The options of an adapter, and its layer, made over an earlier one of the same name."""
    accelerated.enable()
    net, options = nn.Sequential(nn.Linear(24, 40)), request.param | {"projection_prng_key": 2}
    made_over(net, basis="hadamard", projection_prng_key=1).get_delta_weight("default")
    return options, made_over(net, **options)


def test_a_second_adapter_of_the_same_name_has_its_own_bases(second):
    options, layer = second
    alone = made_over(nn.Sequential(nn.Linear(24, 40)), **options)
    assert torch.equal(layer.get_delta_weight("default"), alone.get_delta_weight("default"))


def test_a_second_adapter_of_the_same_name_loads_what_another_of_its_kind_wrote(second):
    options, layer = second
    alone = made_over(nn.Sequential(nn.Linear(24, 40)), **options)
    layer.load_state_dict(alone.state_dict())
    assert torch.equal(layer.randlora_lambda["default"], alone.randlora_lambda["default"])


def test_bases_are_found_again_after_pickling_and_not_held_twice(second):
    _, layer = second
    delta = layer.get_delta_weight("default")
    copy = pickle.loads(pickle.dumps(layer))
    assert not copy.tensor_bases
    assert torch.equal(copy.get_delta_weight("default"), delta)


@pytest.fixture
def net():
    accelerated.enable()
    return nn.Sequential(nn.Embedding(5, 24), nn.Linear(24, 40), nn.Embedding(2, 2))


GOOD = {"targets": "1", "basis": "hadamard"}


def inject(net, model, chosen):
    peft.inject_adapter_in_model(chosen, net)


def add(net, model, chosen):
    model.add_adapter("two", chosen)


@pytest.mark.parametrize("targets, way", [(["0", "1"], inject), (["1", "2"], add)])
def test_an_adapter_that_fails_leaves_the_bases_of_the_first(net, targets, way):
    model = randomize(peft.get_peft_model(net, config(5, accelerated.RandLoraConfig, **GOOD)))
    (layer,) = layers(model)
    wanted = layer.get_delta_weight("default")
    with pytest.raises(ValueError, match="Embedding"):
        way(net, model, config(5, accelerated.RandLoraConfig, targets, density=0.2))
    assert torch.equal(layer.get_delta_weight("default"), wanted)
    assert layer(torch.ones(2, 24)).isfinite().all()


def test_nothing_is_planted_on_the_user_s_model(net):
    before = set(vars(net))
    good = config(5, accelerated.RandLoraConfig, **GOOD)  # one object for two adapters
    model = peft.get_peft_model(net, good)
    model.add_adapter("two", good)
    assert model.unload() is net and set(vars(net)) == before
    assert not net._load_state_dict_pre_hooks and not net._state_dict_hooks


def test_a_layer_of_the_user_s_own_stays_when_lora_is_unloaded():
    own = RandLoraLinear(nn.Linear(24, 24), r=5)
    nn.init.normal_(own.randlora_lambda["default"])
    net = nn.Sequential(nn.Linear(24, 24), own)
    lora = peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(net, lora).eval()
    x = torch.randn(7, 24)
    want = model(x)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged[1]) is RandLoraLinear and not merged[1].merged
    assert relative(merged(x), want) < 1e-5
    unloaded = model.unload()
    assert type(unloaded[0]) is nn.Linear and unloaded[1] is own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{"basis": "hadamard"}, {"density": 0.3}, {}], ids=str)
def test_adapters_beside_a_layer_in_16_bits(options, dtype):
    """Where one operator does not compute all, as with two adapters."""
    model = made(base=lambda: nn.Sequential(nn.Linear(24, 40)).to(dtype), targets="0", **options)
    model.add_adapter("two", model.peft_config["default"])
    model.base_model.set_adapter(["default", "two"])
    randomize(model)
    x = torch.randn(7, 24).to(dtype)
    y, exact = model(x), copy.deepcopy(model).double()(x.double())
    assert y.dtype is dtype and relative(y, exact) < 2 * torch.finfo(dtype).eps
