"""How much a step on Hadamard bases launches beside the frozen layer: counted, not hoped.

On a card torch's profiler counts; in dry mode our kernels and the products that the operators ask
torch for are counted, each of which is one GEMM on a card.
"""

import pytest
import torch
from gpu_helpers import DRY, moved
from layer_cases import make_layer
from torch.profiler import ProfilerActivity, profile

from randlora_ext import _C, TernaryBasis, linear

pytestmark = pytest.mark.gpu


@pytest.fixture
def launches(device, tmp_path, monkeypatch):
    """launches(function): (name, thread blocks) of each launch of our kernels; on a card names of
    all kernels. And how many products there were; on a card these are among the kernels."""

    def on_card(function):
        function()
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            function()
            torch.cuda.synchronize(device)
        every = [e for e in seen.events() if e.device_type is torch.autograd.DeviceType.CUDA]
        return [(event.name, None) for event in every], 0

    def in_dry_mode(function, warm=True):
        if warm:
            function()
        file = tmp_path / "launches"
        file.write_text("")
        before = _C.products()
        monkeypatch.setenv("CUDA_ON_CPU_LAUNCHES", str(file))
        function()
        monkeypatch.delenv("CUDA_ON_CPU_LAUNCHES")
        lines = (line.rsplit(" ", 1) for line in file.read_text().splitlines())
        return [(name, int(blocks)) for name, blocks in lines], _C.products() - before

    return in_dry_mode if DRY else on_card


def step(layer, device, frozen=False):
    """Two functions: forward without a graph, and backward of one forward."""
    x, weight, lam, gam, dy = (
        moved(getattr(layer, name), device) for name in ("x", "weight", "lam", "gam", "dy")
    )
    leaves = [x.requires_grad_(), *([] if frozen else [lam.requires_grad_(), gam.requires_grad_()])]

    def call():
        if frozen:
            return torch.nn.functional.linear(x, weight)
        return linear(x, weight, None, layer.basis, lam, gam, 0.75, "factored")

    y = call()
    return (
        torch.no_grad()(call),
        lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True),
    )


# in, out, r; whether a class is cut off, so that each product is two
SHAPES = [((64, 96, 8), 0), ((96, 64, 8), 0), ((300, 70, 7), 0), ((61, 90, 8), 1), ((90, 61, 8), 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, more", SHAPES, ids=str)
def test_three_launches_forward_and_seven_backward(device, launches, shape, more, dtype):
    layer = make_layer(*shape, "hadamard", 40, dtype)
    few = zip(step(layer, device), step(layer, device, frozen=True), (3, 7), strict=True)
    for function, frozen, limit in few:
        ours, products = launches(function)
        beside = len(ours) + products - len(launches(frozen)[0])
        assert beside <= limit + 3 * more, ours
        if DRY:  # every one of them is known
            parts = (1 + more) * (1 if limit == 3 else 3 if layer.basis.expand else 2)
            kernels = 2 if limit == 3 else 3 if layer.basis.expand else 4
            assert (len(ours), products) == (kernels, parts), ours


@pytest.mark.skipif(not DRY, reason="counts calls of torch's operators on the CPU")
@pytest.mark.parametrize("shape", [(64, 96, 8), (96, 64, 8)], ids=str)
def test_nothing_is_cast_or_copied(device, shape):
    layer = make_layer(*shape, "hadamard", 40, torch.bfloat16)
    for function in step(layer, device):
        function()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            function()
        names = {event.name for event in seen.events()}
        assert any(name.startswith("randlora::hadamard_linear") for name in names), names
        moves = ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous",
                 "aten::zero_", "aten::fill_")  # fmt: skip
        assert not names & set(moves), names


@pytest.mark.skipif(not DRY, reason="the profiler tells no number of thread blocks")
def test_chunks_of_tokens_are_equal(device, launches):
    # z of 64 MiB is one chunk: 512 tokens of 16,384 numbers in float64.
    basis = TernaryBasis(16384, 16384, 32, kind="hadamard")
    x, lam, gam = (
        torch.ones(shape, dtype=torch.float64, device=device)
        for shape in ((520, 16384), (basis.r, basis.n), (basis.n, basis.d))
    )
    seen, _ = launches(lambda: linear(x, None, None, basis, lam, gam, path="factored"), warm=False)
    (_, first), (_, second) = (each for each in seen if each[0] == "hadamard_up")
    assert first == second, "not 512 tokens and a tail of 8"
