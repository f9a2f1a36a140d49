"""What every test of PEFT's models starts with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def always_stock_peft(stock_peft):
    """Every test enables what it needs."""


@pytest.fixture
def x():
    """A batch for `Deep`."""
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(3))
