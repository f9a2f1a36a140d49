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


def test_targets_by_the_ends_of_names():
    model = apply_randlora(small_model(), ["q"], r=3)
    assert [*layers(model)] == ["blocks.0.q", "blocks.1.q"]


def test_targets_by_a_pattern():
    model = apply_randlora(small_model(), r"blocks\.1\.d.*", r=4)
    assert [*layers(model)] == ["blocks.1.down"]


def test_the_adapter_alone_is_trained():
    model = apply_randlora(small_model(), ["q"], r=3, adapter_name="mine")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("randlora_" in name and name.endswith(".mine") for name in trained)


def test_layers_of_equal_sizes_share_their_bases():
    model = apply_randlora(small_model(), ["q"], r=3, density=0.2, basis="independent")
    first, second = (block["q"].bases["default"] for block in model["blocks"])
    assert first.density == 0.2 and first.packed()[0] is second.packed()[0]


def test_a_second_call_adapts_more_layers_and_leaves_the_first():
    model = apply_randlora(small_model(), ["q"], r=3, adapter_name="mine")
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
    "no list": (["q"], {"modules_to_save": "norm"}, "modules_to_save must be a list .* 'norm'"),
    "r by position": (["q"], {"modules_to_save": 4}, "modules_to_save must be a list .* got 4"),
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


@pytest.mark.parametrize("targets", [["q", "0.down"], r".*q|.*k", "all-linear"], ids=str)
def test_names_that_all_match_are_not_told(targets):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_randlora(small_model(), targets, modules_to_save=["blocks.1.norm"], r=4)


def test_a_parameter_that_is_not_there_is_told():
    model = nn.ModuleDict({"experts": nn.ParameterDict({"up": nn.Parameter(torch.ones(2, 8, 8))})})
    with pytest.warns(UserWarning, match=r"target_parameters .* no parameter of .*'down'$"):
        apply_randlora(model, target_parameters=["experts.up", "down"], r=4)


def test_warnings_point_at_the_caller():
    with pytest.warns(UserWarning, match="r = 32 is more than") as caught:
        apply_randlora(small_model(), ["q"])
    assert {w.filename for w in caught} == {__file__}


CALLS = {
    "apply_randlora": lambda model, folder: apply_randlora(model),
    "merge_and_unload": lambda model, folder: merge_and_unload(model),
    "unload": lambda model, folder: unload(model),
    "calibrate": lambda model, folder: randlora_ext.calibrate(model, [torch.ones(2, 12)]),
    "save_adapter": lambda model, folder: randlora_ext.save_adapter(model, folder / "other"),
    "load_adapter": lambda model, folder: randlora_ext.load_adapter(model, folder / "adapter"),
}


@pytest.mark.parametrize("model", ["abc", None, 3, nn.Linear])
@pytest.mark.parametrize("call", CALLS)
def test_a_model_that_is_none(call, model, tmp_path):
    randlora_ext.save_adapter(apply_randlora(small_model(), ["q"], r=4), tmp_path / "adapter")
    with pytest.raises(TypeError, match="^model must be an nn.Module, got "):
        CALLS[call](model, tmp_path)
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


def plain_blocks():
    """Of which the third is the first again."""
    plain = small_model()["blocks"]
    plain.append(plain[0])
    return plain


@pytest.fixture
def blocks():
    """With an idle adapter in one layer, and another layer merged."""
    model = randomize(apply_randlora(plain_blocks(), ["q", "down"], r=3))
    layer = model[1]["q"]
    layer.update_layer("idle", r=2)
    nn.init.normal_(layer.randlora_lambda["idle"])
    model[1]["down"].merge()
    return model


def outputs(blocks):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    return [block[name](x) for block in blocks for name in ("q", "down")]


@pytest.mark.parametrize("take_off", [merge_and_unload, unload])
def test_nothing_of_ours_is_left(blocks, take_off):
    result = take_off(blocks)
    assert not layers(result) and result[0] is result[2]
    assert b"randlora" not in pickle.dumps(result)
    names = [name for name, _ in plain_blocks().named_parameters()]
    assert [name for name, _ in result.named_parameters()] == names


def test_merge_and_unload_keeps_the_outputs(blocks):
    want = outputs(blocks)
    torch.testing.assert_close(outputs(merge_and_unload(blocks)), want, rtol=1e-4, atol=1e-4)


def test_unload_restores_every_weight(blocks):
    for got, was in zip(unload(blocks).parameters(), plain_blocks().parameters(), strict=True):
        assert torch.equal(got, was)


def test_merge_and_unload_of_a_model_that_is_a_layer(blocks):
    assert type(merge_and_unload(blocks[1]["q"])) is nn.Linear


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


@pytest.fixture
def with_a_head():
    """A linear layer, the output embeddings and what torch's attention reads without calling."""
    model = nn.ModuleDict(
        {"a": nn.Linear(8, 8), "head": nn.Linear(8, 4), "mha": nn.MultiheadAttention(8, 2)}
    )
    model.get_output_embeddings = lambda: model["head"]
    return apply_randlora(model, "all-linear", r=2)


def test_all_linear_leaves_out_what_peft_leaves_out(with_a_head):
    assert [*layers(with_a_head)] == ["a"]


def test_all_linear_a_second_time_finds_nothing(with_a_head):
    message = r"'all-linear' matches no module of ModuleDict that is not adapted yet"
    with pytest.raises(ValueError, match=message):
        apply_randlora(with_a_head, "all-linear", r=2)


@pytest.fixture
def headed():
    """Adapted, with modules_to_save."""
    model = small_model()
    model["head"] = nn.Sequential(nn.Linear(12, 3), nn.LayerNorm(3))
    return apply_randlora(model, "all-linear", modules_to_save=["0.norm", "head"], r=2)


def test_modules_to_save_are_trained_whole(headed):
    trained = {n for n, p in headed.named_parameters() if p.requires_grad and "randlora" not in n}
    whole = "blocks.0.norm.", "head.0.", "head.1."
    assert trained == {f"{name}{part}" for name in whole for part in ("weight", "bias")}


def test_modules_to_save_are_not_adapted(headed):
    assert len(layers(headed)) == 4 and type(headed["head"][0]) is nn.Linear


def test_a_layer_of_modules_to_save_that_is_adapted_later_leaves_the_rest_trained(headed):
    apply_randlora(headed, ["head.0"], r=2)
    assert headed["head"][1].weight.requires_grad and not headed["head"][0].weight.requires_grad


def test_modules_to_save_of_integers_are_refused():
    model = small_model()
    model["blocks"][0]["norm"].weight = nn.Parameter(torch.ones(12).int(), requires_grad=False)
    with pytest.raises(ValueError, match="'blocks.0.norm' .* not floating point"):
        apply_randlora(model, ["q"], modules_to_save=["norm"])


def test_a_rank_beyond_the_features_warns():
    with pytest.warns(
        UserWarning, match=r"r = 9 is more than min\(in_features, .* = 8, with which"
    ):
        apply_randlora(nn.Sequential(nn.Linear(8, 12)), ["0"], r=9)
