"""Layers on the card: training as on the CPU, state, merging, PEFT."""

import copy

import pytest
import torch
from gpu_helpers import cases, cpu_kernels
from layer_cases import rms_error
from torch import nn

from randlora_ext import RandLoraLinear, apply_randlora

pytestmark = pytest.mark.gpu


def model(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 80), nn.GELU(), nn.Linear(80, 80), nn.GELU(),
                        nn.Linear(80, 24))  # fmt: skip
    return net.to(dtype)


def trained(net, device, steps=6):
    """Losses of a few AdamW steps on fixed data, and the adapters after them."""
    net = net.to(device)
    make = torch.Generator().manual_seed(1)
    x, y = (torch.randn(40, f, generator=make).to(device) for f in (48, 24))
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    dtype = next(net.parameters()).dtype
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(net(x.to(dtype)).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().cpu() for p in parameters]


KINDS = [*({"density": d, "basis": "independent"} for d in (1 / 3, 0.07)), {"basis": "hadamard"}]


@cases("kind", KINDS)
def test_training_goes_as_on_the_cpu(device, kind):
    net = apply_randlora(model(), ["0", "2", "4"], r=8, **kind)
    with cpu_kernels():
        want, expected = trained(copy.deepcopy(net), "cpu")
    got, parameters = trained(copy.deepcopy(net), device)
    assert want[-1] < want[0]
    assert got == pytest.approx(want, rel=1e-4)
    # AdamW divides by the root of squares: an entry whose gradient is rounding may go either way.
    assert all(rms_error(a, b) <= 1e-2 for a, b in zip(parameters, expected, strict=True))


@cases("kind", KINDS)
def test_moving_state_and_merging(device, kind):
    def errs(layer):
        return rms_error(layer(x.to(device)).detach().cpu(), y)

    with cpu_kernels():
        layer = RandLoraLinear(nn.Linear(50, 37), r=7, **kind)
        nn.init.normal_(layer.randlora_lambda["default"], std=0.05)
        x = torch.randn(9, 50)
        y = layer(x).detach()
    assert errs(layer.to(device)) <= 1e-5
    again = RandLoraLinear(nn.Linear(50, 37), r=7, **kind).to(device)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x.to(device)), layer(x.to(device)))
    layer.merge()
    assert errs(layer) <= 1e-5
    layer.unmerge()
    assert errs(layer) <= 1e-5
    with cpu_kernels():
        assert torch.equal(layer.cpu()(x), y)


@cases("sparse", [{"sparse": True}, {"very_sparse": True}])
def test_peft_accelerated_equals_stock(device, stock_peft, sparse):
    pytest.importorskip("peft")
    from peft_helpers import assert_close, config, inputs, pair, run

    stock, ours = pair(model(), lambda: config(8, targets="024", save_projection=True, **sparse))
    x, dy = (t.to(device) for t in inputs(48, 24))
    assert_close(run(ours.to(device), x, dy), run(stock.to(device), x, dy), 1e-4)
