"""torch.autocast of the operator itself: registered for CPU and CUDA, kept out of its inside."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from layer_cases import CALLS, call, make_layer, ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@CALLS
def test_ours_cast_as_linear_does(basis, dtype):
    layer, wide = (make_layer(50, 37, 7, basis, 20, t) for t in (torch.float32, torch.float64))
    low = replace(layer.to(dtype), lam=layer.lam, gam=layer.gam)  # which autocast leaves alone
    expected, untouched = call(low), call(wide)
    with torch.autocast("cpu", dtype):
        assert F.linear(layer.x, layer.weight).dtype == expected.dtype == dtype
        assert torch.equal(call(layer), expected)
        # each input for itself
        assert torch.equal(call(layer, bias=low.bias), expected)
        assert torch.equal(call(wide), untouched)
        with torch.autocast("cpu", enabled=False):
            assert call(layer).dtype == torch.float32


@CALLS
def test_gradients(basis):
    layer = make_layer(50, 37, 7, basis, 20, torch.float32)
    leaves = [t.requires_grad_() for t in (layer.x, layer.lam, layer.gam)]
    low = replace(layer.to(torch.bfloat16), lam=layer.lam, gam=layer.gam)
    _, *expected = ours(low).values()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(layer)
    for gradient, wanted in zip(torch.autograd.grad(y, leaves, low.dy), expected, strict=True):
        assert gradient.dtype == torch.float32 and torch.equal(gradient, wanted.float())
    # Of a float32 forward, inside of autocast: torch's products inside the operator would be cast,
    # and our kernels read them as float32.
    y = call(layer)
    expected = torch.autograd.grad(y, leaves, layer.dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(y, leaves, layer.dy)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("kind", ["independent", "hadamard", "dense"])
@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
def test_registered_at_the_dispatcher(kind, key):
    for name in (f"randlora::{kind}_linear", f"randlora::{kind}_linear_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
