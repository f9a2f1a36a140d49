"""Rates of the cost model: the file, and what they change."""

import calibrate
import pytest
import torch

from randlora_ext import TernaryBasis, explain
from randlora_ext.ops.costs import predicted_costs
from randlora_ext.ops.rates import Rates, rates, save


def test_calibrate_writes_a_file_that_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "SIZES", ((256, 256),))
    measured = calibrate.calibrate(repeats=1)
    save(tmp_path / "rates.json", measured, ["a machine"])
    monkeypatch.setenv("RANDLORA_RATES", str(tmp_path / "rates.json"))
    for name, dtype in (("fp32", torch.float32), ("16bit", torch.bfloat16)):
        assert rates("cpu", dtype, "planes") == measured["cpu", name]


def test_stochastic_rounding_costs_its_rate():
    for dtype, rate in (
        (torch.float32, 0.0),
        (torch.bfloat16, rates("cpu", torch.bfloat16, "lists").round_entry),
    ):
        nearest, stochastic = (
            predicted_costs(TernaryBasis(64, 64, 8, 1 / 16), 100, True, "cpu", dtype, rounding)
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
