"""torch.autocast of the operator itself: registered for CPU and CUDA, kept out of its inside."""

import pytest
import torch
import torch.nn.functional as F
from layer_cases import make_layer, one_thread  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode

from randlora_ext import linear

ops = torch.ops.randlora
CASES = pytest.mark.parametrize("path", ["factored", "delta", "merged"])


def raw(layer, path, **changes):
    t = {"x": layer.x, "weight": layer.weight, "bias": layer.bias, **changes}
    return ops.linear(
        t["x"], t["weight"], t["bias"], layer.lam, layer.gam, layer.basis.packed(),
        layer.scaling * layer.basis.scale, layer.basis.out_features, path,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@CASES
def test_the_operator_casts_as_linear_does(path, dtype):
    layer = make_layer(50, 37, 7, 0.07, 20, torch.float32)
    low = layer.cast(dtype)
    low.lam, low.gam = layer.lam, layer.gam  # which autocast leaves alone
    expected = raw(low, path)
    with torch.autocast("cpu", dtype):
        assert F.linear(layer.x, layer.weight).dtype == dtype
        assert torch.equal(raw(layer, path), expected)
        assert torch.equal(raw(layer, path, bias=low.bias), expected)  # each input for itself
        with torch.autocast("cpu", enabled=False):
            assert raw(layer, path).dtype == torch.float32


def test_float64_is_left_alone():
    layer = make_layer(50, 37, 7, 0.07, 20)
    expected = raw(layer, "factored")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(raw(layer, "factored"), expected)
        assert torch.equal(
            linear(layer.x, layer.weight, layer.bias, layer.basis, layer.lam, layer.gam,
                   layer.scaling, "factored"),
            expected,
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="must have one dtype|same dtype"):
            raw(layer, "factored", weight=layer.weight.float(), bias=None)


@CASES
@pytest.mark.parametrize("function", ["operator", "linear"])
def test_gradients_arrive_in_the_dtypes_of_their_leaves(function, path):
    layer = make_layer(50, 37, 7, 0.07, 20, torch.float32)
    leaves = [t.requires_grad_() for t in (layer.x, layer.lam, layer.gam)]
    low = layer.cast(torch.bfloat16)
    low.x, low.lam, low.gam = low.x.detach().requires_grad_(), layer.lam, layer.gam

    def run(layer):
        if function == "operator":
            return raw(layer, path)
        rest = layer.basis, layer.lam, layer.gam, layer.scaling, path
        return linear(layer.x, layer.weight, layer.bias, *rest)

    dy = layer.dy.bfloat16()
    expected = torch.autograd.grad(run(low), [low.x, layer.lam, layer.gam], dy)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(layer)
    gradients = torch.autograd.grad(y, leaves, dy)
    assert {g.dtype for g in gradients} == {torch.float32}
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, wanted.float())


@CASES
@pytest.mark.parametrize("function", ["operator", "linear"])
def test_a_float32_forward_has_a_float32_backward_inside_of_autocast(function, path):
    # torch's products inside the operator would be cast, and our kernels read them as float32
    layer = make_layer(50, 37, 7, 0.07, 20, torch.float32)
    leaves = [t.requires_grad_() for t in (layer.x, layer.lam, layer.gam)]
    if function == "operator":
        y = raw(layer, path)
    else:
        rest = layer.basis, layer.lam, layer.gam, layer.scaling, path
        y = linear(layer.x, layer.weight, layer.bias, *rest)
    expected = torch.autograd.grad(y, leaves, layer.dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(y, leaves, layer.dy)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("name", ["linear", "linear_backward"])
@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
def test_registered_at_the_dispatcher(name, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"randlora::{name}", key)


def test_cuda_autocast_without_a_card():
    layer = make_layer(50, 37, 7, 0.07, 20, torch.float32)
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        like = [torch.empty_like(t, device="cuda") for t in (layer.x, layer.weight, layer.bias)]
        diagonals = [torch.empty_like(t, device="cuda") for t in (layer.lam, layer.gam)]
        packed = [torch.empty_like(t, device="cuda") for t in layer.basis.packed()]
        packed.append(torch.empty(50, layer.basis.K, device="cuda"))  # a dense B
        arguments = (*like, *diagonals, packed, 1.0, 37, "factored")
        assert ops.linear(*arguments).dtype == torch.float32
        try:  # torch.autocast("cuda") turns itself off where there is no card
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.float16)
            assert ops.linear(*arguments).dtype == torch.float16
        finally:
            torch.set_autocast_enabled("cuda", enabled)
            torch.set_autocast_dtype("cuda", dtype)
