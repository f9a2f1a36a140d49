"""Weights that cannot be merged into: shared ones, computed ones and those without numbers."""

import copy
import itertools
import os
import threading
import warnings
from collections import OrderedDict

import pytest
import torch
from layer_helpers import make_base, randomize, relative
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from randlora_ext import RandLoraLinear, apply_randlora, merge_and_unload

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, and torch's of old weight_norm


def in_a_model(with_peft, *bases):
    """A model of these layers, each with a random adapter, and what merges it."""
    model = nn.Sequential(OrderedDict(zip("abc", bases, strict=False)))
    if with_peft:
        peft_helpers = pytest.importorskip("peft_helpers")
        model = peft_helpers.adapted(model, "abc", sparse=True)
        return model, (model.merge_adapter, model.merge_and_unload)
    apply_randlora(model, r"[abc]", r=5)
    return randomize(model), (lambda: merge_and_unload(model),)


def shared_views(at, size):
    """Two layers whose weights are slices of one matrix, the second from `at`."""
    W = torch.randn(40, 40)
    row, column = at
    bases = [nn.Linear(24, 24), nn.Linear(*size)]
    bases[0].weight.data = W[:24, :24]
    bases[1].weight.data = W[row : row + size[1], column : column + size[0]]
    return bases


def two_bases(tied=True):
    bases = [make_base(24, 24), make_base(24, 24)]
    if tied:
        bases[1].weight = bases[0].weight
    return bases


def same_module():
    base = make_base(24, 40)
    return nn.ModuleList([RandLoraLinear(base, r=5, seed=key) for key in (1, 2)])


def tied():
    return in_a_model(False, *two_bases())[0]


def same_memory():
    model = tied()
    model[1].base_layer.weight = nn.Parameter(model[0].weight.data, requires_grad=False)
    return model


SHARED = {
    "one module": same_module, "tied": tied, "one memory": same_memory,
    "PEFT": lambda: in_a_model(True, *two_bases())[0].base_model.model,
}  # fmt: skip


@pytest.fixture(params=SHARED)
def shared(request):
    return randomize(SHARED[request.param]())


@pytest.mark.parametrize("keep", ["host", "nothing"])
def test_every_order_of_merging_and_unmerging_two_layers_of_one_weight(shared, keep):
    weight = shared[0].get_base_layer().weight
    W, steps = weight.detach().clone(), list(itertools.product((0, 1), (True, False)))
    for order in itertools.permutations(steps):
        for at, merges in order:
            layer, other = shared[at], shared[1 - at]
            before = weight.detach().clone()
            if not merges:
                layer.unmerge()
            elif other.merged:
                with pytest.raises(RuntimeError, match="share one weight, which can hold"):
                    layer.merge(keep_weight=keep)
                assert torch.equal(weight, before) and not layer.merged
            else:
                layer.merge(keep_weight=keep)
        for layer in shared:
            layer.unmerge()
        assert relative(weight, W) < 1e-6 if keep == "nothing" else torch.equal(weight, W), order
    shared[0].merge()
    named = "layer 'a' and layer 'b'" if shared[1].path else r"RandLoraLinear\(.* and Ra.*\(24->40"
    with pytest.raises(RuntimeError, match=named):
        shared[1].merge()


@pytest.mark.parametrize("with_peft", [False, True])
def test_models_are_checked_before_a_layer_is_merged(with_peft):
    model, merges = in_a_model(with_peft, make_base(24, 24), *two_bases())
    want, before = model(x := torch.randn(3, 24)), copy.deepcopy(model.state_dict())
    for merge in merges:
        with pytest.raises(RuntimeError, match="layer 'b' and layer 'c' share one weight"):
            merge()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert not any(m.merged for m in model.modules() if hasattr(m, "merged_adapters"))
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_weight_that_no_sum_can_be_written_into(dtype):
    base = make_base(24, 24)
    base.weight = nn.Parameter(base.weight.detach().to(dtype), requires_grad=False)
    layer = RandLoraLinear(base, 4)
    with pytest.raises(TypeError, match=f"floating point of 16 bits or more, got {dtype}"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("with_peft", [False, True])
@pytest.mark.parametrize("at, size", [((8, 0), (24, 24)), ((23, 23), (8, 9)), ((0, 12), (12, 24))])
def test_views_that_overlap_share_a_weight(with_peft, at, size):
    model, merges = in_a_model(with_peft, *shared_views(at, size))
    layers = [m for m in model.modules() if hasattr(m, "merged_adapters")]
    before = copy.deepcopy(model.state_dict())
    for merge in merges:
        with pytest.raises(RuntimeError, match="layer 'a' and layer 'b' share one weight"):
            merge()
    layers[1].merge()
    with pytest.raises(RuntimeError, match="share one weight"):
        layers[0].merge()
    layers[1].unmerge()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


@pytest.mark.parametrize("at, size", [((24, 0), (40, 16)), ((0, 24), (16, 24)), ((24, 24), (9, 8))])
def test_views_beside_each_other_are_merged(at, size):
    bases = shared_views(at, size)
    model, merges = in_a_model(False, *bases)
    with torch.no_grad():
        want = [
            base.weight + layer.get_delta_weight("default")
            for base, layer in zip(bases, model, strict=True)
        ]
    for merge in merges:
        merge()
    for base, weight in zip(bases, want, strict=True):
        assert relative(base.weight, weight) < 1e-6


class Tied(nn.Module):
    """A head that has the weight of something without an adapter: as a whole or a part of it."""

    def __init__(self, how):
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 24), nn.Linear(24, 24)
        if how == "parameter":
            self.embed = nn.Embedding(24, 24)
            self.head.weight = self.embed.weight
        elif how == "view":
            self.head.weight = nn.Parameter(self.embed.weight.data[6:])
        elif how == "buffer":
            self.register_buffer("same", self.head.weight.data)
        elif how == "module":
            self.again = nn.ModuleList([self.head])

    def forward(self, x):
        return self.head(x)


NAMES = {
    "parameter": "embed.weight",
    "view": "embed.weight",
    "buffer": "same",
    "module": "again.0.weight",
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("how", [*NAMES, "no"])
def test_merging_tells_of_a_module_without_an_adapter_that_shares_the_weight(how):
    def told(caught):
        return [str(w.message) for w in caught if "share weights" in str(w.message)]

    model = Tied(how)
    wanted = f"layer 'head' with '{NAMES[how]}'" if how in NAMES else "nothing"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apply_randlora(model, r"head", r=5)
        randomize(model)
        at_apply = told(caught)
        merge_and_unload(model)
    at_merge = told(caught)[len(at_apply) :]
    for messages in (at_apply, at_merge):
        assert len(messages) == (how in NAMES)
        assert all(wanted in message for message in messages)
    assert all(w.filename == __file__ for w in caught)


def test_peft_tells_it_when_it_merges():
    peft_helpers = pytest.importorskip("peft_helpers")
    model = peft_helpers.adapted(Tied("parameter"), ["head"], sparse=True)
    with pytest.warns(UserWarning, match="layer 'head' with 'embed.weight'"):
        model.merge_adapter()


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
    "pruning": lambda base: prune.l1_unstructured(base, "weight", 0.5),
}


@pytest.mark.parametrize("how", [*COMPUTED, "meta"])
@pytest.mark.parametrize("with_peft", [False, True])
def test_a_weight_that_cannot_be_written(how, with_peft):
    bad = make_base(24, 24)
    bad = bad.to("meta") if how == "meta" else COMPUTED[how](bad)
    model, merges = in_a_model(with_peft, make_base(24, 24), bad)
    layers = [m for m in model.modules() if hasattr(m, "merged_adapters")]
    before = layers[0].weight.detach().clone()
    told = "has no numbers" if how == "meta" else "is computed at every use"
    for merge in (*merges, layers[1].merge):
        with pytest.raises((RuntimeError, TypeError), match=f"layer 'b': base_layer.weight {told}"):
            merge()
    assert torch.equal(layers[0].weight, before) and not any(layer.merged for layer in layers)


def test_weights_that_accelerate_has_put_elsewhere_are_merged():
    """They are on the meta device until PEFT asks for them, one layer at a time."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, _ = in_a_model(True, *two_bases(tied=False))
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


def test_a_model_is_merged_while_another_thread_merges_another_model(monkeypatch):
    """Merging looks at the weights of all merged layers; meanwhile others may be merged."""
    first, second, of_thread = (RandLoraLinear(make_base(24, 24), r=5) for _ in range(3))
    first.merge(keep_weight="nothing")
    held = RandLoraLinear._held_weight
    threads = []

    def held_weight(layer):
        if layer is first and not threads:
            threads.append(threading.Thread(target=of_thread.merge))
            threads[0].start()
            threads[0].join()
        return held(layer)

    monkeypatch.setattr(RandLoraLinear, "_held_weight", held_weight)
    second.merge()
    assert threads and of_thread.merged and second.merged


def test_two_threads_cannot_merge_two_layers_of_one_weight(monkeypatch):
    """The second thread starts when the first has found that no other layer is merged."""
    first, second = randomize(tied())
    weight = first.get_base_layer().weight
    W = weight.detach().clone()
    refused = []

    def merge_second():
        try:
            second.merge()
        except RuntimeError as error:
            refused.append(str(error))

    thread = threading.Thread(target=merge_second)
    delta = RandLoraLinear._delta

    def delta_while_the_other_merges(layer, *arguments):
        if layer is first and thread.ident is None:
            thread.start()
            thread.join()
        return delta(layer, *arguments)

    monkeypatch.setattr(RandLoraLinear, "_delta", delta_while_the_other_merges)
    first.merge()
    assert first.merged and not second.merged
    assert len(refused) == 1 and "share one weight" in refused[0]
    first.unmerge()
    assert torch.equal(weight, W)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_none_of_the_merges_of_other_threads(monkeypatch):
    """Such a thread does not run in the child, so there it would merge for ever."""
    first, second = tied()
    begun, may_end = threading.Event(), threading.Event()

    def add(layer, *arguments):
        if layer is first:
            begun.set()
            may_end.wait(60)

    monkeypatch.setattr(RandLoraLinear, "_add", add)
    thread = threading.Thread(target=first.merge)
    thread.start()
    assert begun.wait(60)
    with pytest.raises(RuntimeError, match="share one weight"):
        second.merge()
    child = os.fork()
    if child == 0:
        failed = 1
        try:
            second.merge()
            failed = 0
        finally:
            os._exit(failed)
    may_end.set()
    thread.join()
    _, status = os.waitpid(child, 0)
    assert status == 0
