"""randlora_ext.peft: the numbers of stock PEFT, forward and backward."""

import copy
import warnings

import pytest
import torch
from layer_helpers import SHAPES as ALL_SHAPES
from layer_helpers import relative
from peft_helpers import Net, assert_close, config, deltas, inputs, pair, run, runs_on_kernels
from torch import nn

# Few numbers may all be zero, of which a warning tells.
SHAPES = [shape for shape in ALL_SHAPES if 1 not in shape[:2]]
KINDS = ["sparse", "very_sparse", "uniform"]


@pytest.mark.parametrize(
    "shape, kind, dtype",
    [
        *((shape, kind, torch.float64) for shape in SHAPES for kind in ("sparse", "uniform")),
        *((shape, "very_sparse", torch.float64) for shape in SHAPES[::4]),
        *((shape, kind, torch.float32) for shape in SHAPES[1::4] for kind in KINDS),
    ],
    ids=str,
)
def test_same_numbers_as_stock(shape, kind, dtype):
    in_features, out_features, r = shape
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12 if kind == "uniform" else 1e-10
    options = {} if kind == "uniform" else {kind: True}
    stock, ours = pair(Net(in_features, out_features).to(dtype), lambda: config(r, **options))
    assert runs_on_kernels(ours)
    if dtype is torch.float64:
        stock.double(), ours.double()
    x, dy = inputs(in_features, out_features, dtype)
    wanted = run(stock, x, dy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(run(ours, x, dy), wanted, tolerance)
    assert_close(deltas(ours), deltas(stock), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape, autocast_adapter", [((48, 64, 8), False), ((64, 48, 8), True)], ids=["16 bits", "fp32"]
)
def test_adapters_err_at_most_twice_as_much_as_stock(shape, dtype, autocast_adapter):
    """y, dx and the adapter's gradients of a 16-bit model."""
    in_features, out_features, r = shape
    base = Net(in_features, out_features).to(dtype)
    stock, ours = pair(
        base, lambda: config(r, sparse=True), autocast_adapter_dtype=autocast_adapter
    )
    x, dy = inputs(in_features, out_features, dtype, tokens=64)
    exact = run(copy.deepcopy(stock).double(), x.double(), dy.double())
    for mine, theirs, wanted in zip(run(ours, x, dy), run(stock, x, dy), exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert relative(mine, wanted) <= 2 * relative(theirs, wanted)


@pytest.mark.parametrize("kind", ["conv1d", "uniform conv1d", "subclass"])
def test_other_base_layers(kind):
    from transformers.pytorch_utils import Conv1D

    conv1d = "conv1d" in kind
    base = Net(24, 40, Conv1D if conv1d else nn.Linear).double()
    if conv1d:
        nn.init.normal_(base.a.bias)
    if kind == "subclass":
        base.a.__class__ = type("Special", (nn.Linear,), {})
    targets = "a" if conv1d else "abc"
    options = {"fan_in_fan_out": conv1d, "sparse": "uniform" not in kind}
    stock, ours = pair(base, lambda: config(5, targets=targets, **options))
    stock.double(), ours.double()
    x, dy = inputs(24, 40, torch.float64)
    wanted = run(stock, x, dy)
    assert_close(run(ours, x, dy), wanted, 1e-10)
    mine, theirs = (deltas(model)[0] for model in (ours, stock))
    assert mine.shape == base.a.weight.shape and relative(mine, theirs) < 1e-10


def test_autocast():
    models = pair(Net(24, 40), lambda: config(5, sparse=True))
    x, dy = inputs(24, 40)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = (run(model, x, dy) for model in models)
    assert mine[0].dtype == torch.float32
    assert_close(mine, theirs, 0.01)
