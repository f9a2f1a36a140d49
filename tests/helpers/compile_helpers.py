"""Helpers for tests of torch.compile: clean state, graph counts, comparison with eager."""

import os
import shutil

import pytest
import torch
import torch._dynamo
from layer_helpers import small_net
from torch import nn
from torch._dynamo.utils import counters

needs_compiler = pytest.mark.skipif(
    " " in torch.__file__
    or not any(shutil.which(c) for c in (os.environ.get("CXX") or "g++", "clang++")),
    reason="torch.compile's and AOTInductor's code needs a C++ compiler (set CXX, or install g++), "
    "and a torch in a path without spaces, which it does not quote",
)


@pytest.fixture
def fresh_dynamo():
    """Resets torch.compile before and after; ``counters`` start at zero."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model, dynamic=None):
    return torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")


def graphs() -> int:
    """Graphs compiled so far, including recompilations; fails on a graph break."""
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


def mixed_net(kind=1 / 3, **options):
    """Bases of a density, then Hadamard bases: expand and reduce."""
    one, other = small_net(kind, **options), small_net("hadamard", **options)
    return nn.Sequential(one[0], nn.Tanh(), other[2])


def step(model, x):
    """y, dx and the gradients of trained parameters of one training step."""
    x = x.detach().requires_grad_(x.is_floating_point())
    trained = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    y = getattr(y, "logits", y)
    leaves = [x, *trained] if x.requires_grad else trained
    return [y, *torch.autograd.grad(y.float().square().mean(), leaves)]


def assert_steps_agree(compiled, eager, x, tolerance=1e-5):
    """Same numbers, up to the rounding of code that the compiler fuses between our operators."""
    for result, wanted in zip(step(compiled, x), step(eager, x), strict=True):
        assert result.dtype == wanted.dtype
        difference = (result - wanted).abs().max()
        assert difference <= tolerance * wanted.abs().max(), difference / wanted.abs().max()
