"""`explain` and `choose`: which path a call takes, and why."""

import pytest
import torch
from layer_cases import call, make_basis, make_layer

from randlora_ext import _C, TernaryBasis, devices, explain
from randlora_ext.ops.path import MANY, PATHS, PathChoice, choose, dense_b_above, formed_from

SPARSE, FULL = TernaryBasis(512, 512, 32, 1 / 22), TernaryBasis(512, 512, 32, 1.0)
HADAMARD = TernaryBasis(512, 512, 32, kind="hadamard")


@pytest.fixture(autouse=True)
def one_processor(monkeypatch):
    monkeypatch.delenv("RANDLORA_PATH", raising=False)
    monkeypatch.setattr(devices, "CPU", "other")  # the limits of every machine alike


def test_few_tokens_never_pay_for_forming_dw():
    for basis in (SPARSE, FULL, HADAMARD):
        assert explain(basis, 1).path == "factored"
    # Of independent bases a sparse one is never multiplied out, a full one with many tokens.
    assert explain(SPARSE, 10**6).path == "factored"
    assert explain(FULL, 10**6).path == "merged"
    assert explain(FULL, 10**6, torch.bfloat16, has_weight=False).path == "delta"
    dense = make_basis(1024, 1024, 32, "dense")
    assert [explain(dense, tokens).path for tokens in (64, 4096)] == ["factored", "merged"]
    for options in ({"dtype": torch.bfloat16}, {"dropout": 0.1}, {"has_weight": False}):
        assert explain(dense, 4096, **options).path == "delta"
    # What excludes merged: in float32 delta does not pay on independent bases.
    for options in ({"dropout": 0.1}, {"has_weight": False}):
        assert explain(FULL, 10**6, **options).path == "factored"
    choice = explain(FULL, 10**6, torch.float16)
    assert choice.path == "delta" and "16 bits" in choice.reason


@pytest.mark.parametrize(
    "cpu, hadamard, float32, bfloat16",
    [("amx", 4096, 1024, 1024), ("zen5", 1024, MANY, 3072), ("other", 4096, 1024, 3072)],
)
def test_limits_depend_on_the_processor(monkeypatch, cpu, hadamard, float32, bfloat16):
    monkeypatch.setattr(devices, "CPU", cpu)
    assert formed_from(HADAMARD, torch.float32, True, "cpu") == hadamard
    assert formed_from(FULL, torch.float32, True, "cpu") == float32
    assert formed_from(FULL, torch.bfloat16, True, "cpu") == bfloat16
    assert formed_from(HADAMARD, torch.float32, True, "cuda") == MANY  # a card has its own
    assert formed_from(FULL, torch.float32, True, "cuda") == 1024


@pytest.mark.parametrize(
    "cpu, features",
    [
        ("amx", {"avx512_f", "avx_vnni", "amx_tile"}),
        ("zen5", {"avx512_f", "avx_vnni", "sse4a"}),
        ("other", {"avx512_f", "sse4a"}),  # Zen 4
        ("other", {"avx512_f", "avx_vnni"}),  # an Intel without AMX
        ("other", {"neon"}),
    ],
)
def test_processors_are_told_by_their_instructions(monkeypatch, cpu, features):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True))
    assert devices._cpu() == cpu


def test_hadamard_bases_have_one_threshold():
    limit = formed_from(HADAMARD, torch.float32, True, "cpu")
    assert 256 < limit < 10**5
    assert explain(HADAMARD, limit).path == "merged"
    assert explain(HADAMARD, limit - 1).path == "factored"
    assert f"fewer than {limit} tokens" in explain(HADAMARD, 5).reason
    of_types = [{"dtype": dtype} for dtype in (torch.bfloat16, torch.float16)]
    for options in (*of_types, {"has_weight": False}, {"dropout": 0.1}, {"device": "cuda"}):
        choice = explain(HADAMARD, 10**9, **options)
        assert choice.path == "factored" and "any number of tokens" in choice.reason


def test_the_environment_decides_where_no_path_is_given(monkeypatch):
    unset = explain(FULL, 10**6)
    layer = make_layer(64, 64, 8, 1.0, 5, torch.float32, lead=(2, 3))
    results = {path: call(layer, path) for path in PATHS}
    assert not torch.equal(results["factored"], results["delta"])  # the test can tell them apart
    for path in PATHS:
        monkeypatch.setenv("RANDLORA_PATH", path)
        for basis, tokens in ((SPARSE, 1), (FULL, 10**6)):
            choice = explain(basis, tokens)
            assert choice.path == path and "RANDLORA_PATH" in choice.reason
            assert choose("auto", basis, tokens, torch.float32, True, "cpu")[0] == path
            choice = explain(basis, tokens, torch.bfloat16)
            assert choice.path == path  # asked for is asked for
            assert ("merged is excluded" in choice.reason) == (path != "merged")
        assert torch.equal(call(layer), results[path])
        assert torch.equal(call(layer, "factored"), results["factored"])
    for value in ("auto", ""):
        monkeypatch.setenv("RANDLORA_PATH", value)
        assert explain(FULL, 10**6) == unset


def test_environment_asks_for_what_cannot_be(monkeypatch):
    monkeypatch.setenv("RANDLORA_PATH", "delta")  # which Hadamard bases do not have
    assert explain(HADAMARD, 16).path == "factored"
    with pytest.raises(ValueError, match=r"path must be one of .*'merged'.*, got 'delta'"):
        choose("delta", HADAMARD, 16, torch.float32, True, "cpu")
    monkeypatch.setenv("RANDLORA_PATH", "merged")
    for options in ({"dropout": 0.1}, {"has_weight": False}):
        choice = explain(FULL, 16, **options)
        assert choice.path == "delta" and "RANDLORA_PATH asks for merged" in choice.reason
        assert explain(HADAMARD, 16, **options).path == "factored"


def test_what_runs_is_named():
    choice, card = explain(SPARSE, 1024), torch.device("cuda", 0)
    assert isinstance(choice, PathChoice) and choice.b_side == "packed"
    assert all(text in str(choice) for text in (choice.path, choice.isa, choice.reason))
    assert explain(SPARSE, 16, device="cpu").isa == f"{_C.isa()} kernels"
    assert explain(HADAMARD, 16, device="mps").isa == "plain torch"
    assert "no kernels of ours for mps" in explain(SPARSE, 16, device="mps").isa
    assert explain(make_basis(40, 40, 4, "dense"), 16, device=card).isa == "torch's GEMMs"
    served = "cuda kernels" if devices.cuda_available() else "plain torch"
    assert explain(HADAMARD, 16, device=card).isa == served


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", [1.0, 1 / 3, 0.13, 0.07, 1 / 22, "hadamard", "dense"])
@pytest.mark.parametrize("features", [24, 512])
def test_limits_tell_the_choice_for_any_number_of_tokens(features, kind, device_type):
    basis = make_basis(features, 512, 32, kind)
    fp32 = torch.float32
    for dtype, has_weight in ((fp32, True), (torch.bfloat16, True), (fp32, False)):
        arguments = (dtype, has_weight, device_type)
        limit, dense_above = formed_from(basis, *arguments), dense_b_above(basis, device_type)
        near = {limit, dense_above} - {MANY}
        sizes = {0, 1, 16, 10**6, *(edge + e for edge in near for e in (-1, 0, 1))}
        for tokens in sizes:
            path, b_side = choose("auto", basis, tokens, *arguments)
            formed = "merged" if has_weight and dtype == torch.float32 else "delta"
            assert path == (formed if tokens >= limit else "factored")
            told = explain(basis, tokens, dtype, device_type, has_weight)
            assert (path, b_side) == (told.path, told.b_side)
            dense = path == "factored" and tokens > dense_above
            assert b_side == ("dense" if dense else "packed")
            if device_type == "cpu" or kind in ("hadamard", "dense"):
                assert b_side == "packed"  # only our CUDA kernels for independent bases have both


def test_the_b_side_of_cuda_can_be_chosen(monkeypatch):
    def b_side(tokens, basis=SPARSE):
        return choose("factored", basis, tokens, torch.bfloat16, True, "cuda")[1]

    assert (b_side(1), b_side(10**5)) == ("packed", "dense")
    monkeypatch.setenv("RANDLORA_B_SIDE", "dense")
    assert (b_side(1), b_side(1, HADAMARD)) == ("dense", "packed")
    monkeypatch.setenv("RANDLORA_B_SIDE", "packed")
    assert b_side(10**5) == "packed"
    monkeypatch.setenv("RANDLORA_B_SIDE", "wide")
    with pytest.raises(ValueError, match="RANDLORA_B_SIDE must be one of .*'dense'.*, got 'wide'"):
        b_side(1)


# ---- linear(path="auto") takes the path that explain names


@pytest.mark.parametrize(
    "basis, tokens", [(1.0, 3), (1.0, 4000), (0.05, 40), ("hadamard", 40), ("hadamard", 4100)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_weight", [True, False])
def test_auto_is_what_explain_says(basis, tokens, dtype, has_weight):
    layer = make_layer(64, 64, 8, basis, tokens, dtype, lead=(1,))
    if not has_weight:
        layer = layer.without_weight()
    choice = explain(layer.basis, tokens, dtype, has_weight=has_weight)
    assert torch.equal(call(layer), call(layer, choice.path))
