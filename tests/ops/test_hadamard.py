"""Hadamard bases: what only they have. Files beside this one try them with the other kinds.

Sizes that are no powers of two, the input scale, the operators' own checks, and plain torch for
devices without kernels.
"""

from dataclasses import replace

import pytest
import torch
from layer_cases import (
    NAMES,
    SIXTEEN_BITS,
    WAYS,
    Layer,
    assert_rule,
    by_plain_torch,
    exact,
    forward_backward,
    largest_error,
    make_layer,
    operands,
    ours,
    plain,
)  # fmt: skip
from torch.nn import functional as F

from randlora_ext import _C, TernaryBasis, devices
from randlora_ext.ops import hadamard as module
from randlora_ext.reference import delta_weight_reference

ops = torch.ops.randlora
SIZES = [
    (256, 256, 32), (96, 288, 16), (768, 288, 32), (64, 96, 8), (300, 420, 30), (61, 100, 6),
    (50, 50, 7), (10, 11, 3), (1, 1, 4), (9, 7, 50), (130, 61, 7), (40, 512, 2), (1, 37, 1),
    (5, 6, 1), (129, 131, 8), (17, 700, 3),
]  # fmt: skip
ODD = pytest.mark.parametrize("size", SIZES, ids=str)


@ODD
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN_BITS], ids=str)
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
@pytest.mark.parametrize("how", WAYS)
def test_input_scale(size, how):
    # The vector of signs on the input side may hold signs times sigma > 0: dW becomes
    # dW diag(sigma), in everything.
    layer = make_layer(*size, "hadamard", 37)
    s, row, col, expand, scale = operands(layer)
    sigma = (torch.rand(size[0]) * 3 + 0.1).float()
    bases = *((s * sigma, row) if expand else (s, row * sigma)), col, expand, scale
    A, B = layer.basis.dense(dtype=torch.float64)
    W, bias = layer.weight, layer.bias

    def delta(lam, gam):
        return delta_weight_reference(A, B, lam, gam, scale, size[1], size[0]) * sigma.double()

    want = forward_backward(lambda x, *each: F.linear(x, W + delta(*each), bias), layer)
    if how == "kernels":
        got = forward_backward(lambda x, *each: module.linear(x, W, bias, *each, *bases), layer)
    else:
        got = by_plain_torch(layer, bases)
    for name in NAMES:
        assert largest_error(got[name], want[name]) < 1e-12, name

    weight = module.weight if how == "kernels" else module._plain_weight
    leaves = [t.detach().requires_grad_() for t in (layer.lam, layer.gam)]
    dW, mine = delta(*leaves), weight(None, *leaves, *bases)
    grad = torch.randn_like(dW)
    values = ([t, *torch.autograd.grad(t, leaves, grad, retain_graph=True)] for t in (mine, dW))
    for got, want in zip(*values, strict=True):
        assert largest_error(got.detach(), want.detach()) < 1e-12
    assert largest_error(weight(W, *leaves, *bases) - W, dW) < 1e-12


# ---- the operators themselves; test_errors.py has what `linear` can be given


OPERATORS = ("hadamard_linear", "hadamard_linear_backward", "hadamard_weight")


# in = 8, out = 6, r = 3: d = 6, D = 8, n = 2, K = 6
@pytest.mark.parametrize(
    "change, expected, by_both",
    [
        ({"lam": torch.ones(6)}, ["lam"], True),
        ({"lam": torch.ones(4, 2)}, ["col", "8"], True),
        ({"gam": torch.ones(2, 1)}, ["gam", "(2, 1)"], True),
        ({"col": torch.ones(7)}, ["col", "6", "7"], True),
        ({"s": torch.ones(6).char()}, ["s", "float32", "int8"], True),
        ({"weight": torch.ones(1, 8)}, ["weight", "(6, 8)", "(1, 8)"], True),
        # What plain torch finds itself, or need not know.
        ({"s": torch.ones(5)}, ["s", "d = 6", "(5)"], False),
        ({"s": torch.ones(12)[::2]}, ["s", "contiguous"], False),
        ({"s": torch.ones(6).to("meta")}, ["s", "meta", "cpu"], False),
        ({"row": torch.ones(0)}, ["row"], False),
        ({"row": torch.ones(2, 4)}, ["row", "(2, 4)"], False),
        ({"weight": torch.ones(6, 8).int()}, ["weight", "int32"], False),
    ],
)
def test_one_wrong_argument(change, expected, by_both):
    layer = make_layer(8, 6, 3, "hadamard", 4, torch.float32)
    bases = dict(zip(("s", "row", "col", "expand", "scale"), operands(layer), strict=True))
    values = vars(layer) | bases | {"need_x": True, "need_diagonals": True} | change
    for name in OPERATORS:
        op = getattr(ops, name)
        inputs = [values[argument.name] for argument in op.default._schema.arguments]
        by_torch = getattr(module, name.replace("hadamard", "_plain"))
        for function in (op, by_torch)[: 1 + by_both]:
            with pytest.raises(RuntimeError, match="randlora: ") as raised:
                function(*inputs)
            message = str(raised.value).splitlines()[0]
            told = expected if function is op else expected[:2]
            assert all(text in message for text in told), (function, message)


def test_plain_torch_computes_what_a_card_cannot_hold(monkeypatch):
    # On the CUDA kernels compiled for the CPU (docs/cuda-on-cpu.md) this asks them: of these sizes
    # N is 65536.
    basis = TernaryBasis(33024, 33024, 256, kind="hadamard")
    if devices.cuda_serves("cpu"):
        assert devices.what_computes(basis, torch.device("cpu"), torch.float32) == "plain torch"
        x, lam = torch.randn(2, 33024), torch.randn(256, 129)
        gam = torch.zeros(129, 33024).index_fill(1, torch.arange(0, 33024, 511), 1 / 33024)
        layer = Layer(basis, x, None, None, lam, gam, torch.randn(2, 33024))
        for name, value in ours(layer).items():
            assert torch.equal(value, by_plain_torch(layer)[name]), name
    monkeypatch.setattr(devices, "cuda_serves", lambda device_type: True)
    for fits, told in ((False, "plain torch"), (True, f"{_C.isa()} kernels")):
        monkeypatch.setattr(_C, "hadamard_fits", lambda *sizes, fits=fits: fits)
        assert devices.what_computes(basis, torch.device("cpu"), torch.float32) == told


@pytest.mark.parametrize("name", OPERATORS)
def test_plain_torch_is_registered_for_every_other_device(name):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"randlora::{name}", "CompositeExplicitAutograd") and has(f"randlora::{name}", "CPU")
    table = torch._C._dispatch_dump_table(f"randlora::{name}").splitlines()
    for key in ("XPU", "MPS", "PrivateUse1"):
        (line,) = [line for line in table if line.startswith(f"{key}:")]
        assert "default backend kernel" in line, line


def test_the_weight_has_a_gradient():
    layer = make_layer(9, 5, 2, "hadamard", 3)
    W = layer.weight.clone().requires_grad_()
    ops.hadamard_weight(W, layer.lam, layer.gam, *operands(layer)).sum().backward()
    assert torch.equal(W.grad, torch.ones_like(W))
