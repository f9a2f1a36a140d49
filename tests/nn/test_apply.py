"""apply_randlora: which layers it takes, and what it leaves alone."""

import copy
import pickle
import warnings

import pytest
import torch
from layer_helpers import layers, randomize
from torch import nn

import randlora_ext
from randlora_ext import RandLoraLinear, apply_randlora, merge_and_unload, unload


def small_model():
    torch.manual_seed(0)
    parts = {"q": nn.Linear(12, 12), "down": nn.Linear(12, 12), "norm": nn.LayerNorm(12)}
    block = nn.ModuleDict(parts)
    return nn.ModuleDict({"blocks": nn.ModuleList([block, copy.deepcopy(block)])})


def test_apply_by_suffix_and_by_pattern():
    model = apply_randlora(
        small_model(), ["q"], r=3, density=0.2, basis="independent", adapter_name="mine"
    )
    assert [*layers(model)] == ["blocks.0.q", "blocks.1.q"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("randlora_" in name and name.endswith(".mine") for name in trained)
    first, second = (block["q"].bases["mine"] for block in model["blocks"])
    assert first.density == 0.2 and first.packed()[0] is second.packed()[0]

    apply_randlora(model, r"blocks\.1\.d.*", r=4)
    assert [*layers(model)] == ["blocks.0.q", "blocks.1.q", "blocks.1.down"]
    assert model["blocks"][0]["q"].randlora_lambda["mine"].requires_grad
    assert not model["blocks"][0]["norm"].weight.requires_grad


ERRORS = {
    "no such name": (["k"], {}, r"target_modules \['k'\] matches no module .*blocks\.0\.q"),
    "misspelt": (["gq"], {}, r"\['gq'\] matches no module .* did you mean \['q'\]\?; its"),
    "a list is meant": ("q", {}, r"'q' matches no module .* did you mean \['q'\]"),
    "None": (None, {}, "target_modules must be names or a regular expression, got None"),
    "no expression": ("(", {}, r"target_modules '\(' is no regular expression: missing \)"),
    "not linear": (["q", "norm"], {}, r"'blocks\.0\.norm', matched by target_modules .*LayerNorm"),
    "no features": (["q", "empty"], {}, "out_features must be"),  # found when others are made
    "bad r": (["q"], {"r": 0}, "r must be"),
    "other name": (["q"], {"rank": 4}, "^RandLoraLinear.*got .*'rank'"),
    "adapted": (["q", "down"], {}, r"'blocks.0.down', .* is adapted already.*update_layer\(name"),
    "nested": (r".*base_layer", {}, "'blocks.0.down.base_layer'.* inside 'bl.*0.down'.*be nested"),
    "compiled": (r".*_orig_mod", {}, r"'compiled\._orig_mod'.* would not be adapted: torch.com"),
    "no module": (["q"], {"modules_to_save": ["head"]}, "in the ModuleDict, got 'head'"),
    "no list": (["q"], {"modules_to_save": "norm"}, "modules_to_save must list .* 'n'"),
    "buffers": (["q"], {"modules_to_save": ["batch"]}, "'batch' .* has buffers, .*'running_mean'"),
    "nothing left": (["q"], {"modules_to_save": ["q"]}, "matches no module"),
    "whole and adapted": (["q"], {"modules_to_save": ["blocks.0"]}, "modules_to_save is adapted"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_apply_errors_change_nothing(case):
    targets, options, message = ERRORS[case]
    model = small_model()
    model["empty"], model["compiled"] = nn.Linear(8, 0), torch.compile(nn.Linear(8, 8))
    model["batch"] = nn.BatchNorm1d(8)
    apply_randlora(model, ["0.down"], r=4)
    model["blocks"][1]["q"].weight.requires_grad_(True)
    before, trained = [*layers(model)], [p.requires_grad for p in model.parameters()]
    with pytest.raises((TypeError, ValueError), match=message):
        apply_randlora(model, targets, **options)
    assert [*layers(model)] == before
    assert [p.requires_grad for p in model.parameters()] == trained


def test_a_name_that_matches_nothing_beside_others_is_told():
    with pytest.warns(UserWarning) as caught:
        apply_randlora(small_model(), ["q", "donw", "blocks.0.down", "blocks.2.q"], r=4)
    (told,) = caught
    assert "target_modules that match no module of ModuleDict: " in str(told.message)
    assert "'blocks.2.q' (did you mean 'blocks.1.q'?), 'donw' (did you" in str(told.message)
    assert told.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_randlora(small_model(), ["q", "0.down"], ["blocks.1.norm"], r=4)
        apply_randlora(small_model(), r".*q|.*k", r=4)
        apply_randlora(small_model(), "all-linear", r=4)


def test_a_parameter_that_is_not_there_is_told():
    model = nn.ModuleDict({"experts": nn.ParameterDict({"up": nn.Parameter(torch.ones(2, 8, 8))})})
    with pytest.warns(UserWarning, match=r"target_parameters .* no parameter of .*'down'$"):
        apply_randlora(model, target_parameters=["experts.up", "down"], r=4)


def test_warnings_point_at_the_caller():
    with pytest.warns(UserWarning, match="r = 32 is more than") as caught:
        apply_randlora(small_model(), ["q"])
    assert {w.filename for w in caught} == {__file__}


@pytest.mark.parametrize("model", ["abc", None, 3, nn.Linear])
def test_a_model_that_is_none(model, tmp_path):
    path = tmp_path / "adapter"
    randlora_ext.save_adapter(apply_randlora(small_model(), ["q"], r=4), path)
    calls = {
        "apply_randlora": lambda: apply_randlora(model),
        "merge_and_unload": lambda: merge_and_unload(model),
        "unload": lambda: unload(model),
        "calibrate": lambda: randlora_ext.calibrate(model, [torch.ones(2, 12)]),
        "save_adapter": lambda: randlora_ext.save_adapter(model, tmp_path / "other"),
        "load_adapter": lambda: randlora_ext.load_adapter(model, path),
    }
    for call in calls.values():
        with pytest.raises(TypeError, match="^model must be an nn.Module, got "):
            call()
    assert not (tmp_path / "other").exists()


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


def test_a_layer_that_torch_never_calls_is_refused():
    model = encoder()
    with pytest.raises(ValueError, match=r"'layers\.0\.self_attn\.out_proj', matched by .* never"):
        apply_randlora(model, ["out_proj"])
    assert not layers(model) and all(p.requires_grad for p in model.parameters())


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
        assert not layers(result) and result[0] is result[2]
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
    assert torch.equal(first.weight, weight) and len(layers(model)) == 2


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
    message = r"'all-linear' matches no module of ModuleDict that is not adapted yet"
    with pytest.raises(ValueError, match=message):
        apply_randlora(model, "all-linear", r=2)  # nothing is left


def test_modules_to_save_are_trained_whole():
    model = small_model()
    model["head"] = nn.Sequential(nn.Linear(12, 3), nn.LayerNorm(3))
    apply_randlora(model, "all-linear", modules_to_save=["0.norm", "head"], r=2)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "randlora" not in n}
    whole = "blocks.0.norm.", "head.0.", "head.1."
    assert trained == {f"{name}{part}" for name in whole for part in ("weight", "bias")}
    assert len(layers(model)) == 4 and type(model["head"][0]) is nn.Linear
    apply_randlora(model, ["head.0"], r=2)  # which leaves the rest as it is
    assert model["head"][1].weight.requires_grad and not model["head"][0].weight.requires_grad
    nothing = small_model()
    nothing["blocks"][0]["norm"].weight = nn.Parameter(torch.ones(12).int(), requires_grad=False)
    with pytest.raises(ValueError, match="'blocks.0.norm' .* not floating point"):
        apply_randlora(nothing, ["q"], modules_to_save=["norm"])


def test_a_rank_beyond_the_features_warns():
    with pytest.warns(
        UserWarning, match=r"r = 9 is more than min\(in_features, .* = 8, with which"
    ):
        apply_randlora(nn.Sequential(nn.Linear(8, 12)), ["0"], r=9)
