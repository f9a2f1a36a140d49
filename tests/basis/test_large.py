"""Tensors of more than 2^31 elements.

RANDLORA_LARGE=1 python -m pytest tests/basis/test_large.py     # takes 16 GB and a few minutes
"""

import os

import pytest
import torch

from randlora_ext import Basis, linear

pytestmark = pytest.mark.skipif(
    os.environ.get("RANDLORA_LARGE") != "1", reason="takes 16 GB: RANDLORA_LARGE=1 runs it"
)


@pytest.mark.parametrize("density", [1 / 3, 0.07])
def test_tensors_of_more_than_2_31_elements(density):
    torch.set_num_threads(os.cpu_count())
    tokens = 2**28 + 33
    basis = Basis(8, 8, 4, density, seed=1)
    make = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 8, generator=make).bfloat16().repeat(tokens // 4096 + 1, 1)[:tokens]
    assert x.numel() > 2**31
    lam = torch.randn(4, basis.n, generator=make, requires_grad=True)
    gam = torch.randn(basis.n, 8, generator=make, requires_grad=True)
    y = linear(x, None, None, basis, lam, gam)
    few = linear(x[:4096], None, None, basis, lam, gam)
    for start in (0, 2**27 - 2**27 % 4096, 2**28 - 4096, tokens // 4096 * 4096):
        part = y[start : start + 4096]
        assert torch.equal(part, few[: len(part)]), start
    # The gradient of a sum over equal blocks of tokens is that many times the block's.
    y.backward(torch.ones((), dtype=y.dtype).expand_as(y))
    total = [lam.grad.double(), gam.grad.double()]
    lam.grad = gam.grad = None
    few.backward(torch.ones_like(few))
    for got, block in zip(total, (lam.grad, gam.grad), strict=True):
        want = block.double() * (tokens / 4096)
        assert (got - want).norm() < 1e-2 * want.norm()
