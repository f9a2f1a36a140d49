"""What of Hadamard bases only a card shows: long sums by cuBLAS, rows of 32,768 numbers, memory."""

import gc

import pytest
import torch
from gpu_helpers import DRY, LOW, assert_parity, cases, in_turn
from layer_cases import call, make_layer, rms_error

from randlora_ext import TernaryBasis, linear
from randlora_ext.ops import hadamard

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[True] if DRY else [True, False], ids=str)
def reductions(request):
    """Whether cuBLAS may add up partial sums in 16 bits: torch's settings for both dtypes."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, request.param)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)


@cases("dtype", LOW[1:])
@cases("shape", [(512, 640, 32), (640, 512, 32), (300, 310, 7)])
def test_gradients_of_8192_tokens(device, reductions, shape, dtype):
    # Every element of gamma's and lambda's gradient is a sum over all tokens.
    layer = make_layer(*shape, "hadamard", 256 if DRY else 8192, dtype)
    assert_parity(layer, device)


def test_float16_does_not_overflow_in_a_sum_over_tokens(device, reductions):
    # Tokens that agree: sums grow with their number, not with its root.
    layer = make_layer(256, 256, 32, "hadamard", 64 if DRY else 8192, torch.float16)
    layer.x, layer.dy = (t[:1].expand_as(t).contiguous() for t in (layer.x, layer.dy))
    assert_parity(layer, device)


# in, out, r: N = 32,768. d of 16,500 with and without a class that is cut off, B's rows cut off and
# repeated; r > d; the layer the other way.
WIDE = [(16500, 17000, 100), (16500, 16500, 64), (40, 33000, 20000), (17000, 16500, 100)]


@cases("shape, dtype", in_turn(LOW[:2], WIDE))
def test_rows_of_32768_numbers(device, shape, dtype):
    # The oracle is plain torch in float64, on the same device: dense bases would take gigabytes.
    basis = TernaryBasis(*shape, seed=3, kind="hadamard")
    make = torch.Generator().manual_seed(1)

    def normal(*sizes, like, std=1.0):
        return (torch.randn(sizes, generator=make) * std).to(device, like)

    x, dy = (normal(3, features, like=dtype) for features in shape[:2])
    lam = normal(basis.r, basis.n, like=torch.float32, std=basis.r**-0.5)
    gam = normal(basis.n, basis.d, like=torch.float32, std=basis.d**-0.5)
    leaves = [t.requires_grad_() for t in (x, lam, gam)]
    y = linear(x, None, None, basis, lam, gam, 0.75)
    got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    wide = [t.detach().double() for t in (x, dy, lam, gam)]
    last = (None, *wide[2:], *hadamard.operands(basis, device, 0.75))
    want = [
        hadamard._plain_linear(wide[0], None, *last),
        *hadamard._plain_linear_backward(wide[1], wide[0], *last, True, True),
    ]
    bound = 1e-5 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    for name, a, b in zip(("y", "dx", "dlam", "dgam"), got, want, strict=True):
        assert rms_error(a, b) <= bound, name


def test_peak_memory_is_that_of_z_and_w(card):
    tokens, n_in, n_out = 8192, 1024, 2048
    layer = make_layer(n_in, n_out, 32, "hadamard", tokens, torch.bfloat16).to(card)
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
    ours = peak(lambda: call(layer, bias=None), leaves)
    chunk, slots, K = 2 * tokens * layer.basis.K, 512, layer.basis.K
    small = 2 * 2 * K * layer.basis.n + 4 * slots * K + 16 * layer.gam.numel()
    assert ours <= frozen + 2 * chunk + small + (1 << 20)
