"""apply_randlora: which layers it takes, and what it leaves alone."""

import copy
import pickle

import pytest
import torch
from layer_helpers import layers, randomize
from torch import nn

from randlora_ext import RandLoraLinear, apply_randlora, merge_and_unload, unload

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model():
    torch.manual_seed(0)
    block = nn.ModuleDict(
        {"q": nn.Linear(12, 12), "down": nn.Linear(12, 12), "norm": nn.LayerNorm(12)}
    )
    return nn.ModuleDict({"blocks": nn.ModuleList([block, copy.deepcopy(block)])})


def adapted(model):
    return list(layers(model))


def test_apply_by_suffix_and_by_pattern():
    model = apply_randlora(
        small_model(), ["q"], r=3, density=0.2, basis="independent", adapter_name="mine"
    )
    assert adapted(model) == ["blocks.0.q", "blocks.1.q"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("randlora_" in name and name.endswith(".mine") for name in trained)
    first, second = (block["q"].bases["mine"] for block in model["blocks"])
    assert first.density == 0.2 and first.packed()[0] is second.packed()[0]

    apply_randlora(model, r"blocks\.1\.d.*", r=4)
    assert adapted(model) == ["blocks.0.q", "blocks.1.q", "blocks.1.down"]
    assert model["blocks"][0]["q"].randlora_lambda["mine"].requires_grad
    assert not model["blocks"][0]["norm"].weight.requires_grad


@pytest.mark.parametrize(
    "targets,options,error,message",
    [
        (["k"], {}, ValueError, r"target_modules \['k'\] matches no module .*blocks\.0\.q"),
        ("q", {}, ValueError, r"'q' matches no module .* did you mean \['q'\]"),
        ("k", {}, ValueError, "matches no module of .* that is not adapted yet; its"),
        (["q"], {"modules_to_save": ["head"]}, ValueError, "in the ModuleDict, got 'head'"),
        (["q"], {"modules_to_save": "norm"}, ValueError, "modules_to_save must list .* 'n'"),
        (["q"], {"modules_to_save": ["q"]}, ValueError, "matches no module"),  # nothing is left
        (["q", "norm"], {}, TypeError, r"'blocks\.0\.norm', matched by target_modules .*LayerNorm"),
        (["q"], {"r": 0}, ValueError, "r must be"),
        (["q"], {"rank": 4}, TypeError, "^apply_randlora got .*'rank'; did you mean 'r'\\?"),
        (["q"], {"xyz": 4}, TypeError, "argument 'xyz'; it takes r, randlora_alpha, density"),
        (None, {}, TypeError, "target_modules must be names or a regular expression, got None"),
        (["q", 2], {}, TypeError, r"target_modules must be names .* got \['q', 2\]"),
        ("(", {}, ValueError, r"target_modules '\(' is no regular expression: missing \)"),
    ],
    ids=str,
)  # fmt: skip
def test_apply_errors_change_nothing(targets, options, error, message):
    model = small_model()
    with pytest.raises(error, match=message):
        apply_randlora(model, targets, **options)
    assert adapted(model) == []
    assert all(p.requires_grad for p in model.parameters())


def test_a_later_layer_that_fails_leaves_the_first_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 0))
    model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="out_features"):
        apply_randlora(model, ["0", "1"], r=2)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, **options)


@pytest.mark.parametrize("nested", [True, False])
def test_an_encoder_of_torch_calls_the_layers_in_eval_mode_too(nested):
    """Where its fast path is taken it reads the base layers' weights alone."""
    model = apply_randlora(encoder(enable_nested_tensor=nested), ["linear1", "linear2"], r=4)
    randomize(model)
    x, padded = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        for options in ({}, {"src_key_padding_mask": padded}):
            want = model.train()(x, **options)
            torch.testing.assert_close(model.eval()(x, **options), want)
        assert (copy.deepcopy(model)(x) - encoder().train()(x)).abs().max() > 0.1


@pytest.mark.parametrize("targets", [["base_layer"], r".*base_layer", ["0.q.base_layer"]], ids=str)
def test_adapters_cannot_be_nested(targets):
    model = apply_randlora(small_model(), ["0.q"], r=4)
    before, outer = adapted(model), "blocks.0.q"
    with pytest.raises(ValueError, match=f"'{outer}.base_layer'.* inside '{outer}'.*be nested"):
        apply_randlora(model, targets, r=4)
    assert adapted(model) == before
    with pytest.raises(ValueError, match="inside 'the model'.*be nested"):
        apply_randlora(model["blocks"][0]["q"], ["base_layer"], r=4)


def test_a_layer_that_torch_never_calls_is_refused():
    model = encoder()
    with pytest.raises(ValueError, match=r"'layers\.0\.self_attn\.out_proj', matched by .* never"):
        apply_randlora(model, ["out_proj"])
    assert adapted(model) == [] and all(p.requires_grad for p in model.parameters())


def test_merge_and_unload_and_unload():
    plain = small_model()["blocks"]
    plain.append(plain[0])  # tied
    model = randomize(apply_randlora(copy.deepcopy(plain), ["q", "down"], r=3))
    x, layer = torch.randn(5, 12), model[1]["q"]
    layer.update_layer("idle", r=2)
    nn.init.normal_(layer.randlora_lambda["idle"])
    model[1]["down"].merge()
    want = [block[name](x) for block in model for name in ("q", "down")]
    merged, bare = (f(copy.deepcopy(model)) for f in (merge_and_unload, unload))
    for result in (merged, bare):
        assert adapted(result) == [] and result[0] is result[2]
        assert b"randlora" not in pickle.dumps(result)
        names = [name for name, _ in plain.named_parameters()]
        assert [name for name, _ in result.named_parameters()] == names
    for got, y in zip((b[name](x) for b in merged for name in ("q", "down")), want, strict=True):
        torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-4)
    for got, was in zip(bare.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got, was)
    assert type(merge_and_unload(layer)) is nn.Linear


def test_merge_and_unload_that_cannot_changes_nothing():
    model = randomize(apply_randlora(small_model(), ["q"], r=3))
    first, second = (block["q"] for block in model["blocks"])
    weight = first.weight.clone()
    second.base_layer.weight = nn.Parameter(second.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="int8"):
        merge_and_unload(model)
    assert torch.equal(first.weight, weight) and len(adapted(model)) == 2


def test_the_state_dict_of_a_merged_layer_warns():
    layer = randomize(RandLoraLinear(nn.Linear(6, 6), r=2))
    layer.merge()
    with pytest.warns(UserWarning, match=r"base_layer.weight .* holds the merged adapters \['def"):
        layer.state_dict()


def test_all_linear_leaves_out_what_peft_leaves_out():
    model = nn.ModuleDict(
        {"a": nn.Linear(8, 8), "head": nn.Linear(8, 4), "mha": nn.MultiheadAttention(8, 2)}
    )
    model.get_output_embeddings = lambda: model["head"]
    apply_randlora(model, "all-linear", r=2)
    assert [type(m) is RandLoraLinear for m in (model["a"], model["head"])] == [True, False]
    assert not isinstance(model["mha"].out_proj, RandLoraLinear)
    message = r"'all-linear' matches no module.* adapted already \['a'\] \(update_layer adds"
    with pytest.raises(ValueError, match=message):
        apply_randlora(model, "all-linear", r=2)  # nothing is left


def test_an_adapted_layer_is_not_wrapped_again():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_randlora(model, ["0"], r=2)
    adapted = model[0]
    for call in (lambda: apply_randlora(model, ["0", "1"], r=2), lambda: RandLoraLinear(adapted)):
        with pytest.raises(TypeError, match=r"is adapted already.*update_layer\(name"):
            call()
    assert model[0] is adapted and type(model[1]) is nn.Linear


def test_modules_to_save_are_trained_whole():
    model = small_model()
    model["head"] = nn.Sequential(nn.Linear(12, 3), nn.LayerNorm(3))
    apply_randlora(model, "all-linear", modules_to_save=["0.norm", "head"], r=2)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "randlora" not in n}
    whole = "blocks.0.norm.", "head.0.", "head.1."
    assert trained == {f"{name}{kind}" for name in whole for kind in ("weight", "bias")}
    assert len(adapted(model)) == 4 and type(model["head"][0]) is nn.Linear
    with pytest.raises(ValueError, match="'blocks.0.q' of modules_to_save is adapted"):
        apply_randlora(model, ["head.0"], modules_to_save=["q"], r=2)
    apply_randlora(model, ["head.0"], r=2)  # which leaves the rest as it is
    assert model["head"][1].weight.requires_grad and not model["head"][0].weight.requires_grad
    nothing = small_model()
    nothing["blocks"][0]["norm"].weight = nn.Parameter(torch.ones(12).int(), requires_grad=False)
    with pytest.raises(ValueError, match="'blocks.0.norm' .* not floating point"):
        apply_randlora(nothing, ["q"], modules_to_save=["norm"])


def test_what_torch_compile_has_wrapped_already_is_refused():
    """It keeps calling the layer that it was given, and the adapter would do nothing."""
    model = nn.Sequential(torch.compile(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"'0\._orig_mod'.* would not be adapted: torch.compile"):
        apply_randlora(model, r".*_orig_mod", r=2)
    assert adapted(model) == []


def test_a_rank_beyond_the_features_warns():
    with pytest.warns(
        UserWarning, match=r"r = 9 is more than min\(in_features, .* = 8, with which"
    ):
        apply_randlora(nn.Sequential(nn.Linear(8, 12)), ["0"], r=9)
