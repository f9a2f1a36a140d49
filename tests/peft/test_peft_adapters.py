"""randlora_ext.peft: several adapters, merging, and one adapter per row of a batch."""

import pickle

import peft
import pytest
import torch
from layer_cases import delta_by_reference
from peft_helpers import (
    Deep,
    Headed,
    accelerated,
    adapted,
    config,
    layers,
    made,
    opened,
    pair,
    randomize,
    relative,
    shake,
    small_llama,
    t5,
)
from torch import nn
from transformers import GenerationConfig

from randlora_ext import Basis
from randlora_ext.peft.bases import new_bases

OTHERS = [
    (3, {"sparse": True}),
    (11, {}),
    (5, {"density": 0.2, "projection_prng_key": 3}),
    (3, {"basis": "hadamard", "projection_prng_key": 2}),
]


@pytest.mark.parametrize("r, kind", OTHERS, ids=str)
def test_an_adapter_of_another_rank_key_or_kind_is_what_it_is_alone(tmp_path, r, kind, x):
    """Stock PEFT wants one key and one save_projection for all; it still does for its own bases."""
    model = made(sparse=True, save_projection="projection_prng_key" not in kind)
    model.add_adapter("two", config(r, accelerated.RandLoraConfig, **kind))
    randomize(model)
    outputs = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        outputs[name] = model(x)
    model.base_model.set_adapter(["default", "two"])
    assert model(x).isfinite().all()
    model.save_pretrained(tmp_path)
    assert torch.equal(opened(tmp_path / "two")(x), outputs["two"])
    both = opened(tmp_path)
    both.load_adapter(tmp_path / "two", "two")
    for name, wanted in outputs.items():
        both.set_adapter(name)
        assert torch.equal(both(x), wanted)
    with pytest.raises(ValueError, match="PRNG initialisation key must be the same"):
        model.add_adapter("four", config(5, sparse=True, projection_prng_key=9))


@pytest.mark.parametrize("safe, kind", [(True, {"sparse": True}), (False, {})])
@pytest.mark.parametrize("names", [["two"], ["default", "two"], ["two", "default"], None], ids=str)
def test_merging_as_stock(names, kind, safe, x):
    stock, ours = pair(Deep(), lambda: config(5, **kind))
    for model in (stock, ours):
        model.add_adapter("two", config(5, **kind, randlora_alpha=100))
        randomize(model, seed=4)
    ours.base_model.set_adapter(names or ["default"])
    before, weight = ours(x), layers(ours)[0].weight.clone()
    for model in (stock, ours):
        model.merge_adapter(adapter_names=names, safe_merge=safe)
    for mine, theirs in zip(layers(ours), layers(stock), strict=True):
        assert mine.merged_adapters == theirs.merged_adapters == (names or ["default"])
        assert mine.merged and relative(mine.weight, theirs.weight) < 1e-6
    assert relative(ours(x), before) < 1e-5 and relative(ours(x), stock(x)) < 1e-5
    for model in (stock, ours):
        model.unmerge_adapter()
    assert torch.equal(layers(ours)[0].weight, weight) and relative(ours(x), before) < 1e-5
    ours.merge_adapter(adapter_names=names)
    with ours.disable_adapter():  # PEFT unmerges
        assert relative(ours(x), Deep()(x)) < 1e-5
    plain, wanted = (model.merge_and_unload(adapter_names=names) for model in (ours, stock))
    assert not layers(plain) and relative(plain(x), wanted(x)) < 1e-5


def adapters(model, make, names=("two", "three")):
    """A model in eval mode with "default" and more adapters, all of other numbers."""
    for i, name in enumerate(names):
        model.add_adapter(name, make(i))
    return randomize(model).eval()


def row_by_row(model, names, rows, call=None):
    """Each row alone with its adapter active, by the model or by `call`."""
    call, results = call or model, []
    for name, row in zip(names, rows, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                results.append(call(row[None]))
        else:
            model.set_adapter(name)
            results.append(call(row[None]))
    return torch.cat(results)


@pytest.mark.parametrize(
    "kind, shape",
    [({"sparse": True}, (6, 24)), ({"basis": "hadamard"}, (6, 7, 24)), ({}, (6, 7, 24))],
)
def test_each_row_is_that_of_its_adapter(kind, shape):
    model = adapters(made(**kind), lambda i: config((5, 3)[i], sparse=True))
    names = ["two", "default", "__base__", "three", "two", "__base__"]
    x = torch.randn(shape)
    mixed = model(x, adapter_names=names)
    torch.testing.assert_close(mixed, row_by_row(model, names, x))
    # and the next call is an ordinary one
    model.set_adapter("two")
    assert not torch.allclose(model(x), mixed)


def test_adapters_of_other_layers_and_gradients():
    model = made(targets="ab", sparse=True)
    adapters(model, lambda i: config(5, targets=["c"], sparse=True), ["two"])
    names = ["two", "default", "two"]
    x = torch.randn(3, 24, requires_grad=True)
    got = torch.autograd.grad(model(x, adapter_names=names).square().sum(), x)[0]
    wanted = torch.autograd.grad(row_by_row(model, names, x).square().sum(), x)[0]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("second", [{"modules_to_save": ["head"]}, {}], ids=["both", "one"])
def test_modules_to_save_follow(second):
    model = made(base=Headed, sparse=True, modules_to_save=["head"])
    adapters(model, lambda i: config(5, sparse=True, **second), ["two"])
    names, x = ["default", "two", "__base__"], torch.randn(3, 24)
    for name in names[:2]:
        model.set_adapter(name)
        shake(model)
    want = row_by_row(model, names, x)
    for active in ("default", "two"):  # whose head does not matter
        model.set_adapter(active)
        torch.testing.assert_close(model(x, adapter_names=names), want)


def test_errors():
    model = adapters(made(sparse=True), lambda _: config(5))
    x = torch.randn(2, 24)
    known = r"\['default', 'three', 'two'\]"
    with pytest.raises(ValueError, match=rf"unknown \['tow'\]; known are {known}"):
        model(x, adapter_names=["tow", "default"])
    with pytest.raises(ValueError, match="one name per input, got 3 for 2"):
        model(x, adapter_names=["two"] * 3)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x, adapter_names=["two"] * 2)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="needs unmerged adapters"):
        model(x, adapter_names=["two"] * 2)


BEAMS = {"num_beams": 4, "num_return_sequences": 2}


@pytest.mark.parametrize("make, options", [(small_llama, {}), (small_llama, BEAMS), (t5, BEAMS)])
def test_generation(make, options):
    base, chosen = make()
    model = adapted(base, r=8, sparse=True, **chosen)
    adapters(model, lambda _: config(8, sparse=True, **chosen))
    randomize(model, 1, size=30)  # far from each other, so that the adapters answer differently
    names = ["two", "__base__", "default", "three"]
    tokens = torch.randint(3, 50, (4, 6))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    mixed = model.generate(input_ids=tokens, adapter_names=names, **options)
    alone = row_by_row(model, names, tokens, lambda row: model.generate(input_ids=row, **options))
    assert mixed.tolist() == alone.tolist()
    assert len(set(map(tuple, mixed.tolist()))) > len(names) // 2
    if "num_beams" in options:
        given = GenerationConfig(**options, decoder_start_token_id=0, pad_token_id=0)
        again = model.generate(input_ids=tokens, adapter_names=names, generation_config=given)
        assert again.tolist() == mixed.tolist()


def test_every_change_shows_in_the_next_call():
    """What a call may reuse from the one before is dropped by whatever makes it wrong."""
    model = adapted(nn.Sequential(nn.Linear(24, 40)), "0", basis="hadamard", projection_prng_key=1)
    model.add_adapter("two", config(3, accelerated.RandLoraConfig, "0", density=0.3))
    (layer,) = layers(randomize(model))
    bases = {"default": Basis(24, 40, 5, seed=1), "two": Basis(24, 40, 3, 0.3, seed=0)}
    scales = {}

    def replace_bases():
        new = Basis(24, 40, 5, seed=bases["default"].seed + 1)
        options = {"basis": "hadamard", "projection_prng_key": new.seed}
        A, B = new_bases(config(5, accelerated.RandLoraConfig, **options), 40, 24)
        layer.randlora_A["default"], layer.randlora_B["default"] = A, B
        bases["default"] = new

    def scale_inputs():
        scales["default"] = torch.rand(24) + 0.5
        layer.set_input_scale("default", scales["default"])

    def replace_gamma():
        layer.randlora_gamma["default"] = nn.Parameter(layer.randlora_gamma["default"].detach() / 3)

    def choose(*names):
        return lambda: model.base_model.set_adapter([*names])

    for change in (
        lambda: None, replace_bases, scale_inputs, lambda: layer.scaling.update(default=3.0),
        lambda: layer.randlora_lambda["default"].data.mul_(-2), replace_gamma,
        lambda: setattr(layer, "base_layer", nn.Linear(24, 40, bias=False)),
        choose("two"), choose("default", "two"), choose("default"),
        lambda: layer.base_layer.weight.data.mul_(2), model.double, replace_bases,
        lambda: layer.base_layer.register_forward_hook(lambda module, inputs, out: 2 * out),
    ):  # fmt: skip
        change()
        x = torch.randn(7, 24, dtype=layer.base_layer.weight.dtype)
        y = layer.base_layer(x).double()
        for name in layer.active_adapters:
            diagonals = (getattr(layer, f"randlora_{each}")[name] for each in ("lambda", "gamma"))
            factors = (t.double() for t in diagonals)
            scale = scales.get(name)
            delta = delta_by_reference(bases[name], *factors, layer.scaling[name], scale)
            y = y + x.double() @ delta.T
        assert relative(model(x), y) < 1e-6


@pytest.mark.parametrize("second", [{"basis": "hadamard"}, {"density": 0.5}, {"sparse": True}])
def test_a_second_adapter_of_the_same_name_has_its_own_bases(second):
    accelerated.enable()

    def make(net, **options):
        chosen = config(5, accelerated.RandLoraConfig, "0", **options)
        model = peft.get_peft_model(net, chosen)
        (layer,) = layers(randomize(model))
        return layer.get_delta_weight("default"), layer

    net, second = nn.Sequential(nn.Linear(24, 40)), second | {"projection_prng_key": 2}
    make(net, basis="hadamard", projection_prng_key=1)
    got, layer = make(net, **second)
    want, _ = make(nn.Sequential(nn.Linear(24, 40)), **second)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not pickle.loads(pickle.dumps(layer)).bases  # found again, not held twice


def test_an_adapter_that_fails_at_its_first_layer_leaves_the_bases():
    accelerated.enable()
    net = nn.Sequential(nn.Embedding(5, 24), nn.Linear(24, 40), nn.Embedding(2, 2))
    good = config(5, accelerated.RandLoraConfig, "1", basis="hadamard")
    early = config(5, accelerated.RandLoraConfig, ["0", "1"], density=0.2)
    late = config(5, accelerated.RandLoraConfig, ["1", "2"], density=0.2)
    (layer,) = layers(model := randomize(peft.get_peft_model(net, good)))
    wanted = layer.get_delta_weight("default")
    adds = lambda: peft.inject_adapter_in_model(early, net), lambda: model.add_adapter("two", late)
    for add in adds:
        with pytest.raises(ValueError, match="Embedding"):
            add()
        assert torch.equal(layer.get_delta_weight("default"), wanted)
    assert layer(torch.ones(2, 24)).isfinite().all()
    model.add_adapter("three", good)  # one object for three adapters
    model.unload()
    model.add_adapter("four", good)
    assert len(net._load_state_dict_pre_hooks) == 1


def test_adapters_beside_a_layer_are_summed_in_float32():
    """Where one operator does not compute all: two that cancel, beyond the range of float16."""
    accelerated.enable()
    net = nn.Sequential(nn.Linear(24, 40)).half()
    chosen = config(5, accelerated.RandLoraConfig, "0", basis="hadamard", randlora_alpha=100)
    model = peft.get_peft_model(net, chosen)
    model.add_adapter("two", chosen)
    model.base_model.set_adapter(["default", "two"])
    (layer,) = layers(model)
    for name, value in (("default", 3e4), ("two", -3e4)):
        nn.init.constant_(layer.randlora_lambda[name], value)
    x = torch.ones(3, 24).half()
    torch.testing.assert_close(model(x), layer.base_layer(x), rtol=0, atol=0.1)
