"""What only a card has: streams, graphs, several devices, waiting, large memory."""

import functools
import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from gpu_helpers import NAMES, moved, ops, run_linear, same
from layer_cases import make_basis, make_layer, ours, rms_error, run_python

from randlora_ext import RandLoraLinear, TernaryBasis, linear
from randlora_ext.ops.independent import operands

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


@pytest.mark.parametrize("basis", BASES)
def test_everything_runs_on_the_current_stream(card, basis):
    # x and dy become right only after a delay on that stream: work on any other reads NaN.
    layer = make_layer(136, 72, 8, basis, 40, torch.float32).to(card)  # no copy then waits
    want = run_linear(layer, card)
    x, dy = (torch.full_like(t, torch.nan) for t in (layer.x, layer.dy))
    with late_stream(card):
        x.copy_(layer.x)
        dy.copy_(layer.dy)
        got = run_linear(replace(layer, x=x, dy=dy), card)
    assert all(same(got[n], want[n]) for n in NAMES)


def test_packing_runs_on_the_current_stream(card):
    basis = TernaryBasis(300, 200, 8, 0.07, seed=5)
    right = basis._source.b_planes(basis._shape, card)

    def pack(planes):
        lists = ops.planes_to_lists(planes, basis.K, True, False)
        again = ops.lists_to_dense(*lists, basis.D, 1.0, torch.float32)
        dense = ops.planes_to_dense(planes, basis.K, 1.0, torch.bfloat16)
        return moved([*lists, again, dense], "cpu")

    want, late = pack(right), torch.zeros_like(right)
    with late_stream(card):
        late.copy_(right)
        got = pack(late)
    assert same(got, want)


@pytest.mark.parametrize("basis", BASES)
def test_a_basis_packed_on_one_stream_serves_all(card, basis):
    # The stream that packs is far behind; another, which does not wait for it, must find all done.
    make = functools.partial(make_basis, 300, 200, 8, basis)
    second = torch.cuda.Stream(card)
    for seed in range(3):
        basis = make(seed=seed)
        want = [*basis.packed("cpu")]
        with late_stream(card):
            packed = basis.packed(card)
        with torch.cuda.stream(second):
            got = moved([*packed], "cpu")
        if basis.kind != "hadamard":
            del got[2], want[2]  # A's tables, which the CPU has none of
        assert same(got, want)


@pytest.mark.parametrize("basis", [0.07, "hadamard"])
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


@pytest.mark.parametrize("basis", [0.07, "hadamard"])
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


def test_two_streams_at_a_time(card):
    layers = [make_layer(136, 72, 8, basis, 130, torch.bfloat16) for basis in BASES]
    wants = [run_linear(layer, card) for layer in layers]
    streams = [torch.cuda.Stream(card) for _ in layers]
    torch.cuda.synchronize(card)
    results = []
    for _ in range(5):
        for layer, stream, want in zip(layers, streams, wants, strict=True):
            there = layer.to(card)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append((there, ours(there), want))
    torch.cuda.synchronize(card)
    for _, got, want in results:
        assert all(same(got[n].cpu(), want[n]) for n in NAMES)


def test_threads_that_start_one_kernel_with_different_needs(card):
    # It takes 64 KiB of shared memory for one thread, 128 for the other.
    def repeat(features):
        basis = TernaryBasis(features, features, 8, 0.07)
        lam, gam, x = (
            torch.randn(shape, device=card)
            for shape in ((basis.r, basis.n), (basis.n, basis.d), (2, features))
        )
        inputs = x, None, None, lam, gam, *operands(basis, card)
        want = ops.independent_linear(*inputs)
        return all(torch.equal(ops.independent_linear(*inputs), want) for _ in range(300))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(repeat, (4096, 8192)))


# ---- graphs


@pytest.mark.parametrize("tokens", [1, 130])
@pytest.mark.parametrize("basis", BASES)
def test_a_training_step_in_a_graph(card, basis, tokens):
    torch.manual_seed(0)
    base = torch.nn.Linear(136, 72, device=card, dtype=torch.bfloat16)
    layer = adapter(base, basis)
    (lam,), (gam,) = layer.randlora_lambda.values(), layer.randlora_gamma.values()
    torch.nn.init.normal_(lam, std=0.1)
    x = torch.randn(tokens, 136, device=card).bfloat16().requires_grad_()
    dy = torch.randn(tokens, 72, device=card).bfloat16()
    y = torch.empty_like(dy)

    def once():
        x.grad = lam.grad = gam.grad = None
        result = layer(x)
        result.backward(dy)
        y.copy_(result.detach())

    side = torch.cuda.Stream(card)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    held = [y, x.grad, lam.grad, gam.grad]  # where replays write
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():  # the graph must read what is there at its replay
            x.normal_()
            lam.normal_(std=0.1)
            dy.normal_()
        graph.replay()
        replayed = [t.clone() for t in held]
        once()
        assert same(replayed, [y, x.grad, lam.grad, gam.grad])


@pytest.mark.parametrize("basis", BASES)
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


def test_a_card_that_is_not_current(card):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    other = torch.device("cuda", (card.index + 1) % torch.cuda.device_count())
    for basis in BASES:
        layer = make_layer(50, 37, 7, basis, 20, torch.float32)
        want = run_linear(layer, card)
        got = run_linear(layer, other)
        assert torch.cuda.current_device() == card.index
        assert all(same(got[n], want[n]) for n in NAMES), basis


@pytest.mark.parametrize("basis", BASES)
def test_more_than_2_to_the_31_activations(card, room, basis):
    room(45 << 30)
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
            assert rms_error(y[rows], run(x[rows])) <= 2 * eps
    dx, dlam, dgam = torch.autograd.grad(y, [x, lam, gam], y.detach())
    assert dlam.isfinite().all() and dgam.isfinite().all()
    few = x[-40:].detach().requires_grad_()
    (want,) = torch.autograd.grad(run(few), few, y[-40:].detach())
    assert rms_error(dx[-40:], want) <= 2 * eps


def test_a_step_leaves_no_memory_behind(card):
    for basis in BASES:
        layer = make_layer(136, 72, 8, basis, 40, torch.bfloat16)
        run_linear(layer, card)
        torch.cuda.synchronize(card)
        gc.collect()  # what earlier tests left
        before = torch.cuda.memory_allocated(card)
        for _ in range(3):
            run_linear(layer, card)
        assert torch.cuda.memory_allocated(card) == before, basis


TF32 = """
import torch
from gpu_helpers import NAMES, run_linear
from layer_cases import exact, make_layer, rms_error
for basis in (1 / 3, 0.07, "hadamard"):
    layer = make_layer(136, 72, 8, basis, 70, torch.float32)
    want = exact(layer)
    got = run_linear(layer, "cuda")
    errors = [rms_error(got[n], want[n]) for n in NAMES]
    assert max(errors) < 2e-3, errors
"""


def test_tf32_on_request(card):
    run_python("-c", TF32, RANDLORA_TF32="1")  # read once a process, so in one of its own


def test_a_driver_tells_its_version_before_cuda_starts(card):
    # Loading the library relies on it (csrc/torch/backend.cpp).
    program = """
import ctypes
version = ctypes.c_int()
print(ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)), version.value)
"""
    status, version = map(int, run_python("-c", program).split())
    assert status == 0 and version // 1000 >= int(torch.version.cuda.split(".")[0])
