"""The cost model."""

import pytest
import torch

from randlora_ext import TernaryBasis
from randlora_ext.ops.costs import predicted_costs
from randlora_ext.ops.rates import rates


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
