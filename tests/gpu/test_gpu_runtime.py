"""What only a card has: streams, graphs, several devices, waiting, large memory."""

import gc
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from gpu_helpers import cases, moved, run_linear, same
from layer_cases import call, make_basis, make_layer, ours, relative

from randlora_ext import RandLoraLinear, linear

pytestmark = pytest.mark.gpu
BASES = [1 / 3, 0.07, "hadamard"]
DELAY = 20_000_000  # clock cycles: about 10 ms, longer than any launch here


def adapter(base, basis, r=8):
    kind = {"basis": basis} if basis == "hadamard" else {"density": basis}
    return RandLoraLinear(base, r=r, **kind)


@contextmanager
def late_stream(card, delay=DELAY):
    """Within, a stream that begins late, while the device has nothing else to do."""
    stream = torch.cuda.Stream(card)
    torch.cuda.synchronize(card)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(delay)
        yield


@cases("basis", BASES)
def test_everything_runs_on_the_current_stream(card, basis):
    # x and dy become right only after a delay on that stream: work on any other reads NaN.
    layer = make_layer(136, 72, 8, basis, 40, torch.float32).to(card)  # no copy then waits
    want = run_linear(layer, card)
    x, dy = (torch.full_like(t, torch.nan) for t in (layer.x, layer.dy))
    with late_stream(card):
        x.copy_(layer.x)
        dy.copy_(layer.dy)
        got = run_linear(replace(layer, x=x, dy=dy), card)
    assert same(got, want)


@cases("basis", BASES)
def test_a_basis_packed_on_one_stream_serves_all(card, basis):
    # The stream that packs is far behind; another, which does not wait for it, must find all done.
    second = torch.cuda.Stream(card)
    for seed in range(3):
        made = make_basis(300, 200, 8, basis, seed=seed)
        want = made.packed("cpu")
        with late_stream(card):
            packed = made.packed(card)
        with torch.cuda.stream(second):
            got = moved(packed, "cpu")
        if basis != "hadamard":
            got[2] = want[2]  # A's tables, which the CPU has none of
        assert same(got, want)


@cases("basis", [0.07, "hadamard"])
def test_memory_of_a_dropped_basis_waits_for_other_streams(card, basis):
    # Packed on one stream, used by one that is far behind, dropped, and its memory asked for again.
    layer = adapter(torch.nn.Linear(256, 256, device=card), basis)
    torch.nn.init.normal_(layer.randlora_lambda["default"])  # 0 would hide the bases
    x = torch.randn(64, 256, device=card)
    with torch.no_grad():  # a graph would keep the packed tensors alive
        want = layer(x)
    gc.collect()  # the next one is quicker
    with torch.no_grad(), late_stream(card, 50 * DELAY):  # longer than the collection below
        got = layer(x)
    sizes = [t.numel() * t.element_size() for t in layer.bases["default"].packed(card)]
    layer.to("cpu")
    del layer
    gc.collect()
    again = [torch.full((size,), 0x77, dtype=torch.uint8, device=card) for size in sizes]
    torch.cuda.synchronize(card)
    assert same(got, want) and len(again) == len(sizes)


@cases("basis", BASES)
def test_no_basis_is_packed_during_a_capture(card, basis):
    torch.manual_seed(0)
    layer = adapter(torch.nn.Linear(72, 40, device=card), basis)
    x, graph = torch.randn(5, 72, device=card), torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream()
    with torch.no_grad():
        try:
            with pytest.raises(RuntimeError, match="call the layer once before"):
                with torch.cuda.graph(graph):
                    layer(x)
        finally:
            torch.cuda.set_stream(before)
        assert layer(x).isfinite().all()


# ---- graphs


@cases("tokens", [1, 130])
@cases("basis", BASES)
def test_a_training_step_in_a_graph(card, basis, tokens):
    layer = make_layer(136, 72, 8, basis, tokens, torch.bfloat16).to(card)
    side, graph = torch.cuda.Stream(card), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ours(layer)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        held = ours(layer)  # where replays write
    for _ in range(2):
        for t in (layer.x, layer.lam, layer.dy):  # the graph must read what is there at its replay
            t.normal_()
        graph.replay()
        assert same(held, ours(layer))


@cases("basis", BASES)
def test_waiting_for_the_card_is_nowhere_in_a_step(card, basis):
    layer = make_layer(136, 72, 8, basis, 40, torch.bfloat16).to(card)
    ours(layer)  # packs, which waits once
    torch.cuda.synchronize(card)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(layer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- devices, memory, settings


def test_peak_memory_is_that_of_z_and_w(card):
    tokens = 8192
    layer = make_layer(1024, 2048, 32, "hadamard", tokens, torch.bfloat16).to(card)
    leaves = [t.requires_grad_() for t in (layer.x, layer.lam, layer.gam)]

    def peak(forward, of):
        torch.autograd.grad(forward(), of, layer.dy)  # cuBLAS keeps its workspace
        gc.collect()
        torch.cuda.synchronize(card)
        torch.cuda.reset_peak_memory_stats(card)
        before = torch.cuda.memory_allocated(card)
        torch.autograd.grad(forward(), of, layer.dy)
        torch.cuda.synchronize(card)
        return torch.cuda.max_memory_allocated(card) - before

    frozen = peak(lambda: torch.nn.functional.linear(layer.x, layer.weight), leaves[:1])
    adapted = peak(lambda: call(layer, bias=None), leaves)
    chunk, slots, K = 2 * tokens * layer.basis.K, 512, layer.basis.K
    small = 2 * 2 * K * layer.basis.n + 4 * slots * K + 16 * layer.gam.numel()
    assert adapted <= frozen + 2 * chunk + small + (1 << 20)


@pytest.mark.slow
@cases("basis", BASES)
def test_more_than_2_to_the_31_activations(card, basis):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(card)[0] < 45 << 30:
        pytest.skip("needs 45 GiB of free device memory")
    torch.manual_seed(0)
    tokens, features = (1 << 20) + 8, 2048 + 8
    basis = make_basis(features, features, 32, basis)
    lam = (torch.randn(basis.r, basis.n, device=card) * 0.1).requires_grad_()
    gam = (torch.randn(basis.n, basis.d, device=card) * 0.1).requires_grad_()
    x = torch.randn(tokens, features, device=card, dtype=torch.bfloat16, requires_grad=True)

    def run(x):
        return linear(x, None, None, basis, lam, gam)

    y, eps = run(x), torch.finfo(torch.bfloat16).eps
    with torch.no_grad():
        for rows in (slice(0, 40), slice(tokens - 40, tokens)):
            assert relative(y[rows], run(x[rows])) <= 2 * eps
    dx, dlam, dgam = torch.autograd.grad(y, [x, lam, gam], y.detach())
    assert dlam.isfinite().all() and dgam.isfinite().all()
    few = x[-40:].detach().requires_grad_()
    (want,) = torch.autograd.grad(run(few), few, y[-40:].detach())
    assert relative(dx[-40:], want) <= 2 * eps
