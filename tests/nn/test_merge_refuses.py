"""Weights that cannot be merged into: shared ones, computed ones and those without numbers."""

import copy
import itertools
from collections import OrderedDict

import pytest
import torch
from layer_helpers import adapt, make_base, pickled, randomize, relative
from mergeable import bits_of
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from randlora_ext import RandLoraLinear

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, and torch's of old weight_norm


def with_adapters(*bases):
    """A model of these layers, "a", "b", ..., each with a random adapter."""
    model = nn.Sequential(OrderedDict(zip("abc", bases, strict=False)))
    return randomize(adapt(model, *[name for name, _ in model.named_children()], r=5))


def under_peft(*bases):
    peft_helpers = pytest.importorskip("peft_helpers")
    model = nn.Sequential(OrderedDict(zip("abc", bases, strict=False)))
    return peft_helpers.adapted(model, "abc", sparse=True)


def two_bases(tied=True):
    bases = [make_base(24, 24), make_base(24, 24)]
    if tied:
        bases[1].weight = bases[0].weight
    return bases


# ---- two layers of one weight --------------------------------------------------------------------


def same_module():
    base = make_base(24, 40)
    return nn.ModuleList([RandLoraLinear(base, r=5, seed=key) for key in (1, 2)])


SHARED = {
    "one module": same_module,
    "tied": lambda: with_adapters(*two_bases()),
    "PEFT": lambda: under_peft(*two_bases()).base_model.model,
}
COPIES = {
    "itself": lambda model: model,
    "copy": copy.deepcopy,
    "pickle": lambda model: pickled(model)[0],
}


def same_memory():
    bases = two_bases(tied=False)
    bases[1].weight = nn.Parameter(bases[0].weight.data)
    return bases


@pytest.fixture(params=SHARED)
def shared(request):
    return randomize(SHARED[request.param]())


@pytest.mark.parametrize("make", [*SHARED.values(), lambda: with_adapters(*same_memory())])
def test_every_order_of_merging_and_unmerging_two_layers_of_one_weight(make):
    shared = randomize(make())
    weight = shared[0].get_base_layer().weight
    W, steps = bits_of(weight), list(itertools.product((0, 1), (True, False)))
    for order in itertools.permutations(steps):
        for at, merges in order:
            layer, other = shared[at], shared[1 - at]
            before = bits_of(weight)
            if not merges:
                layer.unmerge()
            elif other.merged:
                with pytest.raises(RuntimeError, match="is merged into the weight of .*, which c"):
                    layer.merge()
                assert torch.equal(bits_of(weight), before) and not layer.merged
            else:
                layer.merge()
        for layer in shared:
            layer.unmerge()
        assert torch.equal(bits_of(weight), W), order


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("copied", COPIES)
def test_the_second_layer_is_refused_in_a_copy_too(shared, copied, first):
    W = bits_of(shared[0].get_base_layer().weight)
    shared[first].merge()
    model = COPIES[copied](shared)
    merged, other = model[first], model[1 - first]
    with pytest.raises(RuntimeError, match="is merged into the weight of"):
        other.merge()
    assert merged.merged and not other.merged
    merged.unmerge()
    other.merge()
    other.unmerge()
    assert torch.equal(bits_of(model[0].get_base_layer().weight), W)


def test_the_second_layer_is_refused_after_a_move(shared):
    shared[0].merge()
    shared.double()
    with pytest.raises(RuntimeError, match="is merged into the weight of"):
        shared[1].merge()


def test_weights_in_different_parts_of_one_memory_are_merged():
    """As those that DeepSpeed and FSDP1 have flattened."""
    model = with_adapters(*two_bases(tied=False))
    weights = [layer.base_layer.weight for layer in model]
    for weight, part in zip(weights, torch.stack([*weights]).detach(), strict=True):
        weight.data = part
    want = model(x := torch.randn(3, 24))
    for layer in model:
        layer.merge()
    assert relative(model(x), want) < 1e-5


def test_a_layer_that_is_gone_forbids_nothing():
    base = make_base(24, 40)
    randomize(RandLoraLinear(base, r=5)).merge()
    RandLoraLinear(base, r=5).merge()


def test_the_message_names_the_layers():
    one, two = same_module()
    one.merge()
    with pytest.raises(RuntimeError, match=r"^RandLoraLinear\(24->40; .*\) is merged into the we"):
        two.merge()
    one._path, two._path = "head", "tail"
    with pytest.raises(RuntimeError, match="^layer 'head' is merged .* of layer 'tail', which"):
        two.merge()


@pytest.mark.parametrize("bases", [two_bases, same_memory])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_peft_merges_no_layer_of_such_a_model(bases, method):
    model = under_peft(make_base(24, 24), *bases())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="layer 'b' and layer 'c' share one weight, which can"):
        getattr(model, method)()
    after = model.state_dict()
    assert all(torch.equal(bits_of(after[key]), bits_of(before[key])) for key in before)
    assert not any(m.merged for m in model.modules() if hasattr(m, "merged_adapters"))


# ---- weights that cannot be written --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_weight_that_no_sum_can_be_written_into(dtype):
    base = make_base(24, 24)
    base.weight = nn.Parameter(base.weight.detach().to(dtype), requires_grad=False)
    layer = RandLoraLinear(base, 4)
    with pytest.raises(TypeError, match=f"floating point of 16 bits or more, got {dtype}"):
        layer.merge()
    assert not layer.merged


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
    "pruning": lambda base: prune.l1_unstructured(base, "weight", 0.5),
}


def unwritable(how):
    base = make_base(24, 24)
    return base.to("meta") if how == "meta" else COMPUTED[how](base)


@pytest.mark.parametrize("how", [*COMPUTED, "meta"])
def test_a_weight_that_is_computed_or_has_no_numbers(how):
    layer = RandLoraLinear(unwritable(how), r=5)
    told = "has no numbers" if how == "meta" else "is computed at every use"
    with pytest.raises((RuntimeError, TypeError), match=f"base_layer.weight {told}"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("how", [*COMPUTED, "meta"])
def test_peft_merges_no_layer_beside_such_a_weight(how):
    model = under_peft(make_base(24, 24), unwritable(how))
    first, second = model.base_model.model
    W = bits_of(first.weight)
    told = "has no numbers" if how == "meta" else "is computed at every use"
    for merge in (model.merge_adapter, model.merge_and_unload, second.merge):
        with pytest.raises((RuntimeError, TypeError), match=f"layer 'b': base_layer.weight {told}"):
            merge()
    assert torch.equal(bits_of(first.weight), W) and not first.merged and not second.merged


def test_weights_that_accelerate_has_put_elsewhere_are_merged():
    """They are on the meta device until PEFT asks for them, one layer at a time."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = under_peft(*two_bases(tied=False))
    want = model(x := torch.randn(3, 24))
    layers = list(model.base_model.model)
    for layer in layers:
        hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True)
        hooks.add_hook_to_module(layer.base_layer, hook)
        assert layer.weight.is_meta
    model.merge_adapter()
    assert all(layer.merged for layer in layers) and relative(model(x), want) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(model(x), want)
