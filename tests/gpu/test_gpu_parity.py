"""The card beside the CPU: bases bit for bit, layers by the error rule, on odd sizes in each dtype.

tests/ops, which tools/cuda/run_python_tests.sh runs on the emulated CUDA kernels, has more.
"""

from dataclasses import replace

import pytest
import torch
from gpu_helpers import DRY, cases, cpu_kernels, moved, on_both, run_linear, same
from layer_cases import (
    DENSITIES,
    KINDS,
    SHAPES,
    SIXTEEN_BITS,
    assert_rule,
    exact,
    largest_error,
    make_layer,
    ours,
    plain,
    relative,
)
from torch import nn

from randlora_ext import Basis, RandLoraLinear, delta_weight, linear

pytestmark = pytest.mark.gpu
ALL_TYPES = [torch.float64, torch.float32, *SIXTEEN_BITS]
# Beyond one tile of every kernel; rows of B that repeat; a row of more than 1,024 numbers.
LARGER = [(300, 520, 24), (520, 300, 24), (61, 300, 7), (1100, 1300, 32)]
TOKENS = 40 if DRY else 8192


# ---- bases


@pytest.mark.filterwarnings("ignore:.*no non-zero element")
@cases("density", [*DENSITIES, 1e-3])
def test_bases_are_those_of_the_cpu_bit_for_bit(device, density):
    for shape in [*SHAPES, (130, 200, 1), (3, 700, 2), (300, 520, 24)]:
        basis, on_cpu = (Basis(*shape, density, seed=2**64 - 1) for _ in range(2))
        with cpu_kernels():
            # Not by the cache, which would share what the card makes.
            want = on_cpu._matrices.pack(on_cpu, torch.device("cpu"))
            dense = [on_cpu.dense(dtype=dtype) for dtype in ALL_TYPES]
        got = moved(basis._matrices.pack(basis, device), "cpu")
        # Only kernels on a card need the tables.
        assert got.a_tables.dtype == torch.int32 and want.a_tables.numel() == 0, shape
        assert same(got._replace(a_tables=want.a_tables), want), shape
        assert same([moved(basis.dense(device, dtype), "cpu") for dtype in ALL_TYPES], dense), shape


# ---- layers


def assert_right(layer, device):
    got, oracle, dtype = run_linear(layer, device), exact(layer), layer.x.dtype
    for name, value in got.items():
        assert value.dtype == (dtype if name in ("y", "dx") else layer.lam.dtype), name
        # A wrong element among many would hide in a norm.
        limit = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 0.1)
        assert largest_error(value, oracle[name]) <= limit, (name, layer.basis, len(layer.x))
    if dtype is not torch.float64 and len(layer.x):
        assert_rule(got, plain(layer), oracle, dtype, floor=2)


@cases("dtype", ALL_TYPES)
@cases("basis", KINDS)
def test_linear(device, basis, dtype):
    for shape in [*SHAPES, *LARGER[: 3 if DRY else None]]:
        for tokens in (0, 1, 17, 33) if DRY else (0, 1, 5, 17, 33, 130, 260):
            layer = make_layer(*shape, basis, tokens, dtype)
            assert_right(layer, device)
            assert_right(layer.without_weight(), device)
            if layer.basis.kind == "hadamard":  # the base layer's product comes last
                assert_right(replace(layer, bias=None), device)
                strided = layer.weight.t().contiguous().t()
                assert_right(replace(layer, weight=strided, bias=None), device)


@cases("dtype", ALL_TYPES)
@cases("shape", [(64, 96, 8), (96, 64, 8), (61, 90, 7)])
def test_parts_of_larger_tensors_are_read_where_they_lie(device, shape, dtype):
    whole = replace(make_layer(*shape, "hadamard", 17, dtype), bias=None).to(device)
    named = {name: getattr(whole, name) for name in ("x", "weight", "lam", "gam", "dy")}
    parts = {name: torch.cat([t[:1], t])[1:] for name, t in named.items()}
    assert all(part.storage_offset() > 0 for part in parts.values())
    got, want = ours(replace(whole, **parts)), ours(whole)
    for name, value in got.items():  # other alignment, so sums may have another order
        assert relative(value, want[name]) <= 4 * torch.finfo(value.dtype).eps, name


@cases("dtype", ALL_TYPES)
@cases("basis", KINDS)
def test_weights(device, basis, dtype):
    for shape in ((50, 37, 7), (37, 50, 7), (72, 136, 8)):
        layer = make_layer(*shape, basis, 1, dtype)

        def both(weight, lam, gam, basis=layer.basis):
            leaves = [t.detach().requires_grad_() for t in (lam, gam)]
            dW = delta_weight(basis, *leaves)
            gradients = torch.autograd.grad(dW, leaves, weight.to(dW.dtype))
            return dW.detach(), *gradients

        results = on_both(device, both, layer.weight, layer.lam, layer.gam)
        for eps, got, want in zip((2, 4, 4), *results, strict=True):
            assert got.dtype == want.dtype
            assert relative(got, want) <= eps * torch.finfo(got.dtype).eps, shape


@cases("dtype", ALL_TYPES)
@cases("shape", [(61, 70, 7), (72, 136, 8), (300, 64, 16), *([] if DRY else [(2880, 5000, 32)])])
def test_experts(device, shape, dtype):
    torch.manual_seed(0)
    basis, experts, wide = Basis(*shape, seed=1), 3, torch.promote_types(dtype, torch.float32)
    lam, gam = torch.randn(experts, basis.r, basis.n), torch.randn(experts, basis.n, basis.d)
    a_signs, row_signs, col_signs = basis.packed()
    a_signs, row_signs = (t * (torch.rand(experts, len(t)) + 0.5) for t in (a_signs, row_signs))
    for expand in (True, False):

        def both(*tensors, expand=expand):
            forward = torch.ops.randlora.hadamard_weight(*tensors, expand, 0.01)
            return forward, *torch.ops.randlora.hadamard_weight_backward(*tensors, expand, 0.01)

        sizes = (basis.D, basis.d) if expand else (basis.d, basis.D)
        W = torch.randn(experts, *sizes).to(dtype)
        diagonals = lam.to(wide), gam.to(wide)
        results = on_both(device, both, W, *diagonals, a_signs, row_signs, col_signs)
        for eps, got, want in zip((2, 8, 8), *results, strict=True):
            assert relative(got, want) <= eps * torch.finfo(got.dtype).eps


@cases("dtype", SIXTEEN_BITS)
def test_gradients_that_are_sums_over_many_tokens(device, dtype):
    for shape in ((512, 640, 32), (640, 512, 32), (300, 310, 7)):
        assert_right(make_layer(*shape, "hadamard", TOKENS, dtype), device)
    # Tokens that agree: sums grow with their number, not with its root, and float16 overflows.
    layer = make_layer(256, 256, 32, "hadamard", TOKENS, dtype)
    layer.x, layer.dy = (t[:1].expand_as(t).contiguous() for t in (layer.x, layer.dy))
    assert_right(layer, device)


# in, out, r: N is 16,384, the most that the shared memory of an H100 holds, and 32,768, which plain
# torch computes.
@cases("shape", [(10000, 9000, 100), (9000, 10000, 64), (16500, 17000, 100), (40, 33000, 20000)])
@cases("dtype", [torch.float32, torch.bfloat16])
def test_long_rows(device, shape, dtype):
    torch.manual_seed(0)
    basis = Basis(*shape)

    def both(x, dy, lam, gam):
        leaves = [t.detach().requires_grad_() for t in (x, lam, gam)]
        y = linear(leaves[0], None, None, basis, *leaves[1:], 0.75)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    x, dy = (torch.randn(3, features, dtype=dtype) for features in shape[:2])
    lam, gam = torch.randn(basis.r, basis.n), torch.randn(basis.n, basis.d) / basis.d
    bound = 1e-5 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    for got, want in zip(*on_both(device, both, x, dy, lam, gam), strict=True):
        assert relative(got, want) <= bound


def test_run_to_run_equality(device):
    for basis in KINDS[:3]:
        layer = make_layer(157, 93, 9, basis, 70, torch.bfloat16)
        assert same(*(run_linear(layer, device) for _ in range(2))), basis


@cases("kind", [{"density": 1 / 3}, {"density": 0.07}, {"basis": "hadamard"}])
def test_a_layer_that_moves_trains_and_merges(device, kind):
    def losses(layer, where):
        layer, optimizer = layer.to(where), torch.optim.AdamW(layer.parameters(), lr=1e-3)
        found = []
        for _ in range(5):
            loss = nn.functional.mse_loss(layer(x.to(where)), target.to(where))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    torch.manual_seed(0)
    x, target, layer = torch.randn(40, 50), torch.randn(40, 37), nn.Linear(50, 37)
    start = RandLoraLinear(layer, r=7, **kind).state_dict()
    with cpu_kernels():
        ours = RandLoraLinear(layer, r=7, **kind)
        want = losses(ours, "cpu")
        y = ours(x).detach()
    there = ours.to(device)
    for step in (lambda: None, there.merge, there.unmerge):
        step()
        assert relative(there(x.to(device)).detach().cpu(), y) <= 1e-5
    there.load_state_dict(start)
    assert losses(there, device) == pytest.approx(want, rel=1e-4) and want[-1] < want[0]
