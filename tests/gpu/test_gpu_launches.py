"""How much a step on Hadamard bases launches beside the frozen layer: counted, not hoped.

On a card torch's profiler counts; in dry mode our kernels and the products that the operators ask
torch for are counted, each of which is one GEMM on a card.
"""

import pytest
import torch
from gpu_helpers import DRY, cases
from layer_cases import call, make_layer
from torch.profiler import ProfilerActivity, profile

from randlora_ext import _C

pytestmark = pytest.mark.gpu


@pytest.fixture
def launches(device, tmp_path, monkeypatch):
    """launches(function): the name of each kernel of ours that it launches, and how many products
    there were; on a card the names of all kernels, those of products among them."""
    file = tmp_path / "launches"

    def launches(function):
        function()
        if not DRY:
            torch.cuda.synchronize(device)
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                function()
                torch.cuda.synchronize(device)
            cuda = torch.autograd.DeviceType.CUDA
            return [e.name for e in seen.events() if e.device_type is cuda], 0
        file.write_text("")
        before = _C.products()
        with monkeypatch.context() as during:
            during.setenv("CUDA_ON_CPU_LAUNCHES", str(file))
            function()
        return file.read_text().splitlines(), _C.products() - before

    return launches


def step(layer, device, frozen=False):
    """Two functions: forward without a graph, and backward of one forward."""
    layer = layer.to(device)
    leaves = [t.requires_grad_() for t in (layer.x, layer.lam, layer.gam)[: 1 if frozen else 3]]

    def forward():
        if frozen:
            return torch.nn.functional.linear(layer.x, layer.weight)
        return call(layer, bias=None)

    y = forward()
    return (
        torch.no_grad()(forward),
        lambda: torch.autograd.grad(y, leaves, layer.dy, retain_graph=True),
    )


# in, out, r; whether a class is cut off, so that each product is two
SHAPES = [((64, 96, 8), 0), ((96, 64, 8), 0), ((300, 70, 7), 0), ((61, 90, 8), 1), ((90, 61, 8), 1)]


@cases("dtype", [torch.float32, torch.bfloat16])
@cases("shape, more", SHAPES)
def test_three_launches_forward_and_seven_backward(device, launches, shape, more, dtype):
    layer = make_layer(*shape, "hadamard", 40, dtype)
    few = zip(step(layer, device), step(layer, device, frozen=True), (3, 7), strict=True)
    for function, frozen, limit in few:
        ours, products = launches(function)
        # In dry mode the frozen layer's product is counted in the step alone, where it comes last.
        beside = len(ours) + products - (1 if DRY else len(launches(frozen)[0]))
        assert beside <= limit + 3 * more, ours
        if DRY:  # every one of them is known
            parts = (1 + more) * (1 if limit == 3 else 3 if layer.basis.expand else 2)
            kernels = 2 if limit == 3 else 3 if layer.basis.expand else 4
            assert (len(ours), products) == (kernels, parts + 1), ours


@cases("transposed", [False, True])
def test_as_many_launches_for_a_stack_of_experts(device, launches, transposed):
    basis = make_layer(64, 96, 8, "hadamard", 1, torch.float32).basis
    lam, gam = torch.randn(5, 8, basis.n), torch.randn(5, basis.n, basis.d)
    W = torch.randn(5, *((64, 96) if transposed else (96, 64)))
    operands = [t.to(device) for t in (W, lam, gam, *basis.packed())]
    for op, limit in (("hadamard_weight", 1), ("hadamard_weight_backward", 2)):
        op = getattr(torch.ops.randlora, op)
        ours, products = launches(lambda op=op: op(*operands, not transposed, 1.0))
        assert (len(ours), products) == (limit, 0), ours
        if DRY and limit == 2:
            # Three multiprocessors take 12 blocks in two waves: two for each of five experts.
            assert ours[0] == "hadamard_weight_backward 2"


@pytest.mark.skipif(not DRY, reason="reads the number of blocks that the emulated kernels note")
@cases("tokens, slots", [(40, 40), (512, 512), (513, 257), (840, 420)])
def test_no_slots_beyond_those_that_shorten_the_longest(device, launches, tokens, slots):
    backward = step(make_layer(8, 8, 2, "hadamard", tokens, torch.float32), device)[1]
    ours, _ = launches(backward)
    assert f"hadamard_down {slots}" in ours, ours


@pytest.mark.skipif(not DRY, reason="counts calls of torch's operators on the CPU")
@cases("shape", [(64, 96, 8), (96, 64, 8)])
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
