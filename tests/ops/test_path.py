"""`explain` and the choice of a path."""

import pytest
import torch
from layer_cases import make_layer
from randlora_ext.ops.costs import choose_b_side

from randlora_ext import _C, TernaryBasis, explain, linear
from randlora_ext.ops.path import PATHS, PathChoice, choose, path_regions

SPARSE, DENSE = TernaryBasis(512, 512, 32, 1 / 22), TernaryBasis(512, 512, 32, 1.0)
SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("RANDLORA_PATH", raising=False)


def test_structure():
    choice = explain(SPARSE, 1024)
    assert isinstance(choice, PathChoice)
    assert choice.path in PATHS and choice.isa == _C.isa() and choice.reason
    assert sorted(choice.costs) == sorted(PATHS)
    assert all(isinstance(c, float) and c > 0 for c in choice.costs.values())
    assert choice.path == min(choice.costs, key=choice.costs.get)
    text = str(choice)
    assert choice.path in text and choice.isa in text and choice.reason in text
    assert all(f"{path} {cost:.2f}" in text for path, cost in choice.costs.items())


def test_the_model_ranks_what_is_plain():
    # Few tokens never pay for forming dW; a sparse basis is never multiplied out; a dense one is,
    # once there are tokens enough.
    assert explain(SPARSE, 1).path == explain(DENSE, 1).path == "factored"
    assert explain(SPARSE, 10**6).path == "factored"
    assert explain(DENSE, 10**6).path == "merged"
    assert explain(DENSE, 10**6, torch.bfloat16, has_weight=False).path == "delta"
    costs = [explain(DENSE, tokens).costs for tokens in (16, 256, 4096)]
    assert costs[0]["delta"] > costs[1]["delta"] > costs[2]["delta"]
    assert explain(SPARSE, 16).costs["factored"] < explain(DENSE, 16).costs["factored"]


@SIXTEEN_BITS
def test_16_bits_exclude_merged(dtype):
    choice = explain(DENSE, 10**6, dtype)
    assert choice.path == "delta" and "16 bits" in choice.reason
    assert choose("auto", DENSE, 10**6, dtype, True, "cpu")[0] == "delta"


def test_dropout_and_a_missing_weight_exclude_merged():
    for options in ({"dropout": 0.1}, {"has_weight": False}):
        choice = explain(DENSE, 10**6, **options)
        assert choice.path != "merged" and "merged" not in choice.costs


@pytest.mark.parametrize("path", PATHS)
def test_environment_overrides(path, monkeypatch):
    monkeypatch.setenv("RANDLORA_PATH", path)
    for basis, tokens in ((SPARSE, 1), (DENSE, 10**6)):
        choice = explain(basis, tokens)
        assert choice.path == path and "RANDLORA_PATH" in choice.reason
        assert choose("auto", basis, tokens, torch.float32, True, "cpu")[0] == path
        assert explain(basis, tokens, torch.bfloat16).path == path  # asked for is asked for


@pytest.mark.parametrize("value", ["auto", ""])
def test_environment_that_leaves_the_choice(value, monkeypatch):
    expected = explain(DENSE, 10**6)
    monkeypatch.setenv("RANDLORA_PATH", value)
    assert explain(DENSE, 10**6) == expected


def test_environment_asks_for_merged_where_it_cannot_be(monkeypatch):
    monkeypatch.setenv("RANDLORA_PATH", "merged")
    for options in ({"dropout": 0.1}, {"has_weight": False}):
        choice = explain(DENSE, 16, **options)
        assert choice.path == "delta" and "apart" in choice.reason


def test_device_is_named():
    assert explain(SPARSE, 16, device="cpu").isa == _C.isa()
    assert explain(SPARSE, 16, device=torch.device("cuda", 0)).isa == "cuda"


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("density", [1.0, 1 / 3, 0.13, 0.07, 1 / 22])
@pytest.mark.parametrize("features", [24, 512])
def test_regions_tell_the_choice_for_any_number_of_tokens(features, density, device_type):
    basis = TernaryBasis(features, 512, 32, density)
    for dtype, has_weight in (
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.float32, False),
    ):
        arguments = (dtype, has_weight, device_type)
        regions = path_regions(basis, *arguments)
        assert 1 <= len(regions) <= 5 and regions[-1].last > 10**18
        for tokens in (*range(2000), 10**4, 10**6, 10**7, 10**9):
            path, b_side = choose("auto", basis, tokens, *arguments)
            told = explain(basis, tokens, dtype, device_type, has_weight)
            assert path == told.path
            if dtype == torch.float32:  # in 16 bits "merged" is told and not taken
                assert told.costs[path] == min(told.costs.values())
            if path == "factored":
                assert b_side == choose_b_side(basis, tokens, device_type)
        assert all(a[1:] != b[1:] for a, b in zip(regions, regions[1:], strict=False))


# ---- linear(path="auto") takes the path that explain names


@pytest.mark.parametrize("density, tokens", [(1.0, 3), (1.0, 4000), (0.05, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_weight", [True, False])
def test_auto_is_what_explain_says(density, tokens, dtype, has_weight):
    layer = make_layer(64, 64, 8, density, tokens, dtype, lead=(1,))
    if not has_weight:
        layer = layer.without_weight()
    arguments = (layer.x, layer.weight, layer.bias, layer.basis, layer.lam, layer.gam, 1.0)
    choice = explain(layer.basis, tokens, dtype, has_weight=has_weight)
    assert torch.equal(linear(*arguments), linear(*arguments, path=choice.path))


def test_the_environment_decides_only_where_no_path_is_given(monkeypatch):
    layer = make_layer(64, 64, 8, 1.0, 5, torch.float32, lead=(2, 3))
    arguments = (layer.x, layer.weight, layer.bias, layer.basis, layer.lam, layer.gam, 1.0)
    results = {path: linear(*arguments, path=path) for path in PATHS}
    for path in PATHS:
        monkeypatch.setenv("RANDLORA_PATH", path)
        assert torch.equal(linear(*arguments), results[path])
    monkeypatch.setenv("RANDLORA_PATH", "delta")
    assert torch.equal(linear(*arguments, path="factored"), results["factored"])
    assert not torch.equal(results["factored"], results["delta"])  # the test can tell them apart


def test_choices_do_not_grow_with_the_numbers_of_tokens():
    basis = TernaryBasis(64, 64, 8, 0.3, seed=77)
    for tokens in range(1, 600):
        choose("auto", basis, tokens, torch.float32, True, "cpu")
    assert len(basis.path_regions) == 1
