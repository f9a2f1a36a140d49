"""Rates of the cost model: the fit, the file, and what they change."""

import calibrate
import pytest
import torch

from randlora_ext import TernaryBasis, explain
from randlora_ext.ops.costs import path_terms, predicted_costs
from randlora_ext.ops.rates import NAMES, Rates, rates, save

KNOWN = Rates(0.5, 1.5, 0.25, 3.0, 90.0, 0.0, 70.0, 1.25, 2.0, 80.0, 40.0, 1.1, 30.0)
BASES = [
    calibrate.basis_of(density, size, 8)
    for size in ((64, 64), (96, 64), (64, 132))
    for density in ("1/16", "1/9", "1/3", "block:1/2", "block:1/4", "dense")
]


def samples_of(known: Rates):
    for basis in BASES:
        for path, (_, paid) in path_terms(basis, 128, False).items():
            paid = {name: count for name, count in paid.items() if name != "form_term"}
            if path == "delta":
                rounded = paid | {"round_entry": 1 / 128}
                yield path, rounded, sum(getattr(known, n) * count for n, count in rounded.items())
            yield path, paid, sum(getattr(known, name) * count for name, count in paid.items())


def test_fit_finds_the_rates_that_made_the_samples():
    fitted, error = calibrate.fit([(paid, units) for _, paid, units in samples_of(KNOWN)])
    assert error < 1e-4
    for name in NAMES:
        assert getattr(fitted, name) == pytest.approx(getattr(KNOWN, name), rel=1e-3, abs=1e-6)


def test_fit_has_no_negative_rates():
    samples = [({"a_side": 1.0, "b_lists": 1.0}, 1.0), ({"a_side": 1.0, "b_lists": 2.0}, 0.9)]
    fitted, error = calibrate.fit(samples)
    assert fitted.b_lists == 0.0 and fitted.a_side == pytest.approx(0.95, abs=0.01) and error > 0


@pytest.mark.parametrize(
    "density, factored, formed",
    [
        ("1/16", {"a_side", "b_lists"}, "form_entry"),
        ("1/3", {"a_side", "b_planes"}, "form_entry"),
        ("block:1/4", {"block"}, "block_entry"),
        ("dense", {"dense", "dense_entry"}, "dense_entry"),
    ],
)
def test_measured_samples_pay_what_the_path_does(density, factored, formed):
    samples = calibrate.measure_size((64, 96), density, torch.float32, "cpu", 1)
    assert factored == set(samples[0][0]) and formed in samples[1][0]
    assert all(units > 0 for _, units in samples) and len(samples) == 2
    samples = calibrate.measure_size((64, 96), density, torch.bfloat16, "cpu", 1)
    assert samples[2][0] == samples[1][0] | {"round_entry": 1 / calibrate.TOKENS}


def test_stochastic_rounding_costs_its_rate():
    for dtype, rate in (
        (torch.float32, 0.0),
        (torch.bfloat16, rates("cpu", torch.bfloat16, "lists").round_entry),
    ):
        nearest, stochastic = (
            predicted_costs(BASES[0], 100, True, "cpu", dtype, rounding)
            for rounding in ("nearest", "stochastic")
        )
        assert stochastic.pop("merged") == pytest.approx(nearest.pop("merged") + rate / 100)
        assert stochastic == nearest


def test_file_is_read_back_and_changes_the_choice(tmp_path, monkeypatch):
    basis = TernaryBasis(512, 512, 32, 1 / 3, seed=41)
    assert explain(basis, 64).path == "factored"
    free_formation = Rates(100.0, 100.0, 100.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    save(tmp_path / "rates.json", {("cpu", "fp32"): free_formation}, ["a machine"])
    monkeypatch.setenv("RANDLORA_RATES", str(tmp_path / "rates.json"))
    assert rates("cpu", torch.float32, "planes") == free_formation
    assert explain(basis, 64).path == "merged"
    assert predicted_costs(basis, 64, True)["merged"] == 1.0
    monkeypatch.delenv("RANDLORA_RATES")
    assert explain(basis, 64).path == "factored"


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"rates": {"cpu": {"fp32": {"a_side": 1}}}}', '{"rates": {"cpu": {"fp32": 3}}}',
     '{"rates": {"cpu": {"fp32": {"a_side": -1, "b_lists": 1, "b_planes": 1, '
     '"form_add": 1, "form_scatter": 1, "form_term": 1, "form_entry": 1}}}}'],
)  # fmt: skip
def test_a_file_that_is_none(text, tmp_path, monkeypatch):
    file = tmp_path / "bad.json"
    file.write_text(text)
    monkeypatch.setenv("RANDLORA_RATES", str(file))
    with pytest.raises(ValueError, match="RANDLORA_RATES.*bad.json"):
        explain(TernaryBasis(64, 64, 8, 1 / 3), 16)


def test_a_missing_file(monkeypatch):
    monkeypatch.setenv("RANDLORA_RATES", "/nowhere/rates.json")
    with pytest.raises(ValueError, match="RANDLORA_RATES.*nowhere"):
        explain(TernaryBasis(64, 64, 8, 1 / 3), 16)
