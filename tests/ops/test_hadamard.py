"""Hadamard bases: what only they have. Files beside this one try them with the other kinds.

Sizes that are no powers of two, the input scale, the range of float16, the operators' own checks,
and plain torch for devices without kernels.
"""

from dataclasses import replace

import pytest
import torch
from layer_cases import (
    NAMES,
    SIXTEEN_BITS,
    Layer,
    assert_rule,
    exact,
    forward_backward,
    largest_error,
    make_layer,
    opcheck,
    operands,
    ours,
    plain,
    rms_error,
)
from torch.nn import functional as F

from randlora_ext import _C, TernaryBasis, delta_weight, devices, merged_weight
from randlora_ext.devices import what_computes
from randlora_ext.ops import hadamard as module
from randlora_ext.reference import delta_weight_reference

ops = torch.ops.randlora
ALL_TYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN_BITS], ids=str)
SIZES = [
    (256, 256, 32), (96, 288, 16), (768, 288, 32), (64, 96, 8), (300, 420, 30), (61, 100, 6),
    (50, 50, 7), (10, 11, 3), (1, 1, 4), (9, 7, 50), (130, 61, 7), (40, 512, 2), (1, 37, 1),
    (5, 6, 1), (129, 131, 8), (17, 700, 3),
]  # fmt: skip
ODD = pytest.mark.parametrize("size", SIZES, ids=str)


def by_plain_torch(layer, bases=None):
    """y and the gradients by the functions for devices without kernels."""
    inputs = layer.x, layer.weight, layer.bias, layer.lam, layer.gam
    bases = operands(layer) if bases is None else bases
    x, weight, _, lam, gam = inputs
    results = (
        module._plain_linear(*inputs, *bases),
        *module._plain_linear_backward(layer.dy, x, weight, lam, gam, *bases, True, True),
    )
    return dict(zip(NAMES, results, strict=True))


WAYS = {"kernels": ours, "plain torch": by_plain_torch}


# ---- numbers


@ODD
@ALL_TYPES
def test_odd_sizes(size, dtype):
    one, some, many, none = (
        make_layer(*size, "hadamard", tokens, dtype, lead)
        for tokens, lead in ((1, ()), (5, (3,)), (130, ()), (0, (2,)))
    )
    some = replace(some, bias=None)
    for layer in (one.without_weight(), some, many, many.without_weight(), none):
        oracle = exact(layer)
        for how, way in WAYS.items():
            result = way(layer)
            assert all(result[n].shape == oracle[n].shape for n in NAMES), how
            if dtype == torch.float64:
                worst = max(largest_error(result[n], oracle[n]) for n in NAMES)
                assert worst < 1e-12, (how, worst)
            else:
                floor = 4 if dtype == torch.float32 else 2
                if min(size[:2]) == 1:  # all of dlam is one sum, which may cancel
                    floor = 64
                assert_rule(result, plain(layer), oracle, dtype, floor)


@ODD
@ALL_TYPES
def test_merged_weight(size, dtype):
    layer = make_layer(*size, "hadamard", 1, dtype).to(dtype)
    weight, wide = layer.weight, torch.promote_types(dtype, torch.float32)
    total = weight.to(wide) + delta_weight(layer.basis, layer.lam.to(wide), layer.gam.to(wide), 0.5)
    half = replace(layer, scaling=0.5)
    for result in (
        merged_weight(layer.basis, weight, layer.lam, layer.gam, 0.5),
        module._plain_weight(weight, layer.lam, layer.gam, *operands(half)),
    ):
        assert result.dtype == dtype and result.is_contiguous()
        error = (result.to(wide) - total).abs()
        assert (error <= torch.finfo(dtype).eps * total.abs() + 4e-6 * total.abs().max()).all()


@ODD
@pytest.mark.parametrize("how", WAYS)
def test_input_scale(size, how):
    # The vector of signs on the input side may hold signs times sigma > 0: dW becomes
    # dW diag(sigma), in everything.
    layer = make_layer(*size, "hadamard", 37)
    basis, n_in, n_out = layer.basis, *size[:2]
    s, row, col, expand, scale = operands(layer)
    sigma = (torch.rand(n_in) * 3 + 0.1).float()
    s, row = (s * sigma, row) if expand else (s, row * sigma)
    bases = s, row, col, expand, scale
    A, B = basis.dense(dtype=torch.float64)

    def oracle(x, lam, gam):
        dW = delta_weight_reference(A, B, lam, gam, scale, n_out, n_in) * sigma.double()
        return F.linear(x, layer.weight + dW, layer.bias)

    want = forward_backward(oracle, layer)
    if how == "kernels":
        W, bias = layer.weight, layer.bias
        got = forward_backward(lambda x, *each: module.linear(x, W, bias, *each, *bases), layer)
    else:
        got = by_plain_torch(layer, bases)
    for name in NAMES:
        assert largest_error(got[name], want[name]) < 1e-12, name

    weight = module.weight if how == "kernels" else module._plain_weight
    leaves = [t.detach().requires_grad_() for t in (layer.lam, layer.gam)]
    dW = delta_weight_reference(A, B, *leaves, scale, n_out, n_in) * sigma.double()
    got = weight(None, *leaves, *bases)
    assert largest_error(got.detach(), dW.detach()) < 1e-12
    assert largest_error(weight(layer.weight, *leaves, *bases) - layer.weight, dW) < 1e-12
    grad = torch.randn_like(dW)
    for mine, true in zip(
        *(torch.autograd.grad(each, leaves, grad) for each in (got, dW)), strict=True
    ):
        assert largest_error(mine, true) < 1e-12


# A layer in float16 by lambda, gamma, x and dy: the first step of Adam under a loss scale of one,
# and diagonals that differ by nine powers of ten.
RANGES = {
    "dy of 1e-2": (1e-4, 1 / 4096, 1, 1e-2),
    "dy of 1e-3": (1e-4, 1 / 4096, 1, 1e-3),
    "dy of 1e-4": (1e-4, 1 / 4096, 1, 1e-4),
    "large gamma": (1e-6, 1000 / 4096, 100, 1e-2),
}


@pytest.mark.parametrize("sizes", [(4096, 4096), (1024, 1152), (1152, 1024)], ids=str)
@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("how", WAYS)
def test_range_of_float16(sizes, name, how):
    lam, gam, x, dy = RANGES[name]
    if how == "plain torch" and sizes[0] == 4096:
        pytest.skip("one test of this size suffices")
    layer = make_layer(*sizes, 32, "hadamard", 64, torch.float16).without_weight()
    layer.scaling, layer.lam = 20.0, layer.lam.sign() * lam
    layer.gam, layer.x, layer.dy = layer.gam.sign() * gam, layer.x * x, layer.dy * dy
    oracle, results = exact(layer), WAYS[how](layer)
    for which, want in oracle.items():
        assert results[which].isfinite().all(), which
        # dx itself may be smaller than what float16 holds.
        subnormal = results[which].dtype == torch.float16 and want.abs().max() < 2.0**-14
        bound = 2.0**-25 / want.square().mean().sqrt().item() if subnormal else 0.0
        assert rms_error(results[which], want) < 0.01 + bound, which


@pytest.mark.parametrize(
    "sizes, how",
    [
        ((4096, 4096), "kernels"), ((1024, 1152), "kernels"),
        ((1024, 1152), "plain torch"), ((1152, 1024), "plain torch"),
    ],
    ids=str,
)  # fmt: skip
def test_a_large_activation_in_float16_stays_finite(sizes, how):
    # Language models have activations of some thousands in a few features. lambda = 1 and
    # gamma = 1 / d, as at the start: y is small, and so must be everything between.
    layer = make_layer(*sizes, 32, "hadamard", 2, torch.float16).without_weight()
    basis = layer.basis
    x, dy = torch.zeros_like(layer.x), torch.zeros_like(layer.dy)
    x[0, 7], x[1] = 5000, layer.x[1]
    dy[0], dy[1, 5] = layer.dy[0] / 100, 5000
    lam, gam = torch.ones(basis.r, basis.n), torch.full((basis.n, basis.d), 1 / basis.d)
    layer = replace(layer, x=x, dy=dy, lam=lam, gam=gam, scaling=1.0)
    oracle, results = exact(layer), WAYS[how](layer)
    for name in NAMES:
        assert results[name].isfinite().all(), name
        assert rms_error(results[name], oracle[name]) < 2e-3, name


# ---- the operators themselves


def call(name, layer, **changes):
    """The operator on the layer's tensors, some of which are replaced."""
    s, row, col, expand, scale = operands(layer)
    values = {
        "dy": layer.dy, "x": layer.x, "weight": layer.weight, "bias": layer.bias,
        "lam": layer.lam, "gam": layer.gam, "s": s, "row": row, "col": col, "expand": expand,
        "scale": scale, "need_x": True, "need_diagonals": True, **changes,
    }  # fmt: skip
    op = getattr(ops, name)
    names = [argument.name for argument in op.default._schema.arguments]
    assert set(changes) <= set(names)
    return op, *(values[k] for k in names)


OPERATORS = ("hadamard_linear", "hadamard_linear_backward", "hadamard_weight")


@pytest.mark.parametrize(
    "shape, dtype", [((9, 5, 2), torch.float32), ((5, 9, 2), torch.float16)], ids=str
)
def test_opcheck(shape, dtype):
    layer = make_layer(*shape, "hadamard", 3, dtype, lead=(1,))
    fast = dtype == torch.float16
    for needs in ((True, True), (True, False), (False, True)):
        change = dict(zip(("need_x", "need_diagonals"), needs, strict=True))
        backward = call("hadamard_linear_backward", layer, **change)
        opcheck(*backward, fast=fast or all(needs))
    opcheck(*call("hadamard_weight", layer), fast=fast)
    opcheck(*call("hadamard_weight", layer, weight=None), fast=True)
    opcheck(*call("hadamard_linear", layer, weight=None, bias=None), fast=True)
    for leaf in (layer.x, layer.lam, layer.gam):
        leaf.requires_grad_()
    opcheck(*call("hadamard_linear", layer, x=layer.x.mT.contiguous().mT), fast=True)
    opcheck(*call("hadamard_linear", layer), fast=fast)


# in = 8, out = 6, r = 3: d = 6, D = 8, n = 2, K = 6
WRONG = [
    (OPERATORS, {"lam": torch.ones(6)}, ["lam"]),
    (OPERATORS, {"lam": torch.ones(3, 2).int()}, ["lam", "int32"]),
    (OPERATORS, {"lam": torch.ones(4, 2)}, ["col", "8"]),
    (OPERATORS, {"gam": torch.ones(2, 1)}, ["gam", "(2, 1)"]),
    (OPERATORS, {"gam": torch.ones(2, 6).int()}, ["gam", "int32"]),
    (OPERATORS, {"col": torch.ones(7)}, ["col", "6", "7"]),
    (OPERATORS, {"s": torch.ones(6).char()}, ["s", "float32", "int8"]),
    (OPERATORS, {"s": torch.ones(6).double()}, ["s", "float32", "float64"]),
    (OPERATORS[:2], {"x": torch.ones(4, 7)}, ["x", "8", "(4, 7)"]),
    (OPERATORS[:2], {"x": torch.ones(4, 8).int()}, ["x", "int32"]),
    (OPERATORS[:2], {"x": torch.ones(4, 8).half()}, ["float16", "float32"]),
    (OPERATORS, {"weight": torch.ones(1, 8)}, ["weight", "(6, 8)", "(1, 8)"]),
    (OPERATORS[:2], {"weight": torch.ones(6, 8).double()}, ["weight", "float64", "float32"]),
    (OPERATORS[:1], {"bias": torch.ones(1)}, ["bias", "6", "(1)"]),
    (OPERATORS[:1], {"weight": None}, ["bias", "without a weight"]),
    (OPERATORS[1:2], {"dy": torch.ones(4, 5)}, ["dy", "(4, 5)"]),
    (OPERATORS[1:2], {"dy": torch.ones(3, 6)}, ["dy", "(3, 6)", "(4, 8)"]),
    (OPERATORS[1:2], {"dy": torch.ones(4, 6).double()}, ["dy", "float64"]),
]
# What plain torch finds itself, or need not know.
WRONG_FOR_KERNELS = [
    (OPERATORS, {"gam": torch.ones(2, 6, device="meta")}, ["gam", "meta", "cpu"]),
    (OPERATORS, {"s": torch.ones(5)}, ["s", "d = 6", "(5)"]),
    (OPERATORS, {"s": torch.ones(12)[::2]}, ["s", "contiguous"]),
    (OPERATORS, {"s": torch.ones(6).to("meta")}, ["s", "meta", "cpu"]),
    (OPERATORS, {"row": torch.ones(0)}, ["row"]),
    (OPERATORS, {"row": torch.ones(2, 4)}, ["row", "(2, 4)"]),
    (OPERATORS, {"weight": torch.ones(6, 8, device="meta")}, ["weight", "meta", "cpu"]),
    (OPERATORS[2:], {"weight": torch.ones(6, 8).int()}, ["weight", "int32"]),
]


@pytest.mark.parametrize(
    "names, change, expected, by_both",
    [*((*case, True) for case in WRONG), *((*case, False) for case in WRONG_FOR_KERNELS)],
)
def test_one_wrong_argument(names, change, expected, by_both):
    layer = make_layer(8, 6, 3, "hadamard", 4, torch.float32)
    before = {k: v.clone() for k, v in vars(layer).items() if isinstance(v, torch.Tensor)}
    for name in names:
        op, *inputs = call(name, layer, **change)
        by_torch = getattr(module, name.replace("hadamard", "_plain"))
        for function in (op, by_torch)[: 1 + by_both]:
            with pytest.raises(RuntimeError, match="randlora: ") as raised:
                function(*inputs)
            message = str(raised.value).splitlines()[0]
            told = expected if function is op else expected[:2]
            assert all(text in message for text in told), (function, message)
    assert all(torch.equal(getattr(layer, k), v) for k, v in before.items())


# ---- devices without kernels


def test_plain_torch_computes_what_a_card_cannot_hold(monkeypatch):
    # On the CUDA kernels compiled for the CPU (docs/cuda-on-cpu.md) this asks them: of these sizes
    # N is 65536.
    basis = TernaryBasis(33024, 33024, 256, kind="hadamard")
    if devices.cuda_serves("cpu"):
        assert what_computes(basis, torch.device("cpu"), torch.float32) == "plain torch"
        x, lam = torch.randn(2, 33024), torch.randn(256, 129)
        gam = torch.zeros(129, 33024).index_fill(1, torch.arange(0, 33024, 511), 1 / 33024)
        layer = Layer(basis, x, None, None, lam, gam, torch.randn(2, 33024))
        for name, value in ours(layer).items():
            assert torch.equal(value, by_plain_torch(layer)[name]), name
    monkeypatch.setattr(devices, "cuda_serves", lambda device_type: True)
    for fits, told in ((False, "plain torch"), (True, f"{_C.isa()} kernels")):
        monkeypatch.setattr(_C, "hadamard_fits", lambda *sizes, fits=fits: fits)
        assert what_computes(basis, torch.device("cpu"), torch.float32) == told


def test_plain_torch_is_registered_for_every_other_device():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in OPERATORS:
        assert has(f"randlora::{name}", "CompositeExplicitAutograd")
        assert has(f"randlora::{name}", "CPU")
        for key in ("XPU", "MPS", "PrivateUse1"):
            assert not has(f"randlora::{name}", key)  # so that the composite one is taken
            table = torch._C._dispatch_dump_table(f"randlora::{name}")
            (line,) = [line for line in table.splitlines() if line.startswith(f"{key}:")]
            assert "default backend kernel" in line, line


def test_the_weight_has_a_gradient():
    layer = make_layer(9, 5, 2, "hadamard", 3)
    W = layer.weight.clone().requires_grad_()
    ops.hadamard_weight(W, layer.lam, layer.gam, *operands(layer)).sum().backward()
    assert torch.equal(W.grad, torch.ones_like(W))
