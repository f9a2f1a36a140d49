"""Hadamard bases: what only they have. Files beside this one try them with the other kinds.

Sizes that are no powers of two, the range of float16, the operators' own checks, and plain torch
for devices without kernels.
"""

from dataclasses import replace

import pytest
import torch
from layer_cases import (
    NAMES,
    SIXTEEN_BITS,
    assert_rule,
    exact,
    largest_error,
    make_layer,
    opcheck,
    ours,
    plain,
    rms_error,
)

from randlora_ext import delta_weight, merged_weight
from randlora_ext.ops import hadamard as module

ops = torch.ops.randlora
ALL_TYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN_BITS], ids=str)
SIZES = [
    (256, 256, 32), (96, 288, 16), (768, 288, 32), (64, 96, 8), (300, 420, 30), (61, 100, 6),
    (50, 50, 7), (10, 11, 3), (1, 1, 4), (9, 7, 50), (130, 61, 7), (40, 512, 2), (1, 37, 1),
    (5, 6, 1), (129, 131, 8), (17, 700, 3),
]  # fmt: skip
ODD = pytest.mark.parametrize("size", SIZES, ids=str)


def constants(layer):
    return module.operands(layer.basis, layer.x.device, layer.scaling)


def plain_torch(layer, merge=False):
    """y and the gradients by the functions for devices without kernels."""
    inputs = layer.x, layer.weight, layer.bias, layer.lam, layer.gam, *constants(layer), merge
    x, weight, _, *rest = inputs
    results = (
        module._plain_linear(*inputs),
        *module._plain_linear_backward(layer.dy, x, weight, *rest, True, True),
    )
    return dict(zip(NAMES, results, strict=True))


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
        results = {"kernels": ours(layer, "factored"), "plain torch": plain_torch(layer)}
        if layer.weight is not None and dtype.itemsize > 2:
            results["merged"] = ours(layer, "merged")
        for how, result in results.items():
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
        module._plain_weight(weight, layer.lam, layer.gam, *constants(half), None),
    ):
        assert result.dtype == dtype and result.is_contiguous()
        error = (result.to(wide) - total).abs()
        assert (error <= torch.finfo(dtype).eps * total.abs() + 4e-6 * total.abs().max()).all()
    if dtype.itemsize == 2:
        with pytest.raises(RuntimeError, match="rounding_seed needs our kernels"):
            module._plain_weight(weight, layer.lam, layer.gam, *constants(half), 3)


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
    results = ours(layer, "factored") if how == "kernels" else plain_torch(layer)
    oracle = exact(layer)
    for name in NAMES:
        assert results[name].isfinite().all(), name
        assert rms_error(results[name], oracle[name]) < 2e-3, name


# ---- the operators themselves


def call(name, layer, **changes):
    """The operator on the layer's tensors, some of which are replaced."""
    s, row, col, scale, first_row, first_column, expand = constants(layer)
    values = {
        "dy": layer.dy, "x": layer.x, "weight": layer.weight, "bias": layer.bias,
        "lam": layer.lam, "gam": layer.gam, "s": s, "row": row, "col": col, "scale": scale,
        "first_row": first_row, "first_column": first_column, "expand": expand, "merge": False,
        "need_x": True, "need_diagonals": True, "rounding_seed": None, **changes,
    }  # fmt: skip
    op = getattr(ops, name)
    names = [argument.name for argument in op.default._schema.arguments]
    assert set(changes) <= set(names)
    return op, *(values[k] for k in names)


OPERATORS = ("hadamard_linear", "hadamard_linear_backward", "hadamard_weight")


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    "shape, dtype", [((9, 5, 2), torch.float32), ((5, 9, 2), torch.bfloat16)], ids=str
)
def test_opcheck(shape, dtype, merge):
    layer = make_layer(*shape, "hadamard", 3, dtype, lead=(1,))
    fast = merge == (dtype == torch.float32)
    for needs in ((True, True), (True, False), (False, True))[: 3 - 2 * merge]:
        change = dict(zip(("need_x", "need_diagonals"), needs, strict=True))
        backward = call("hadamard_linear_backward", layer, merge=merge, **change)
        opcheck(*backward, fast=fast or not all(needs))
    if merge:
        opcheck(*call("hadamard_weight", layer), fast=fast)
    else:
        opcheck(*call("hadamard_weight", layer, weight=None), fast=fast)
        opcheck(*call("hadamard_linear", layer, weight=None, bias=None), fast=True)
        if dtype == torch.bfloat16:
            opcheck(*call("hadamard_weight", layer, rounding_seed=5), fast=True)
    for leaf in (layer.x, layer.lam, layer.gam):
        leaf.requires_grad_()
    strided = layer.x.mT.contiguous().mT if merge else layer.x
    opcheck(*call("hadamard_linear", layer, x=strided, merge=merge), fast=fast)


# in = 8, out = 6, r = 3: d = 6, D = 8, n = 2, K = 6
WRONG = [
    (OPERATORS, {"lam": torch.ones(6)}, ["lam"]),
    (OPERATORS, {"lam": torch.ones(3, 2).int()}, ["lam", "int32"]),
    (OPERATORS, {"lam": torch.ones(2, 2)}, ["col", "4"]),
    (OPERATORS, {"gam": torch.ones(2, 1)}, ["gam", "(2, 6)", "(2, 1)"]),
    (OPERATORS, {"gam": torch.ones(2, 6).int()}, ["gam", "int32"]),
    (OPERATORS[:2], {"s": torch.ones(5).char()}, ["gam", "(2, 5)", "(2, 6)"]),
    (OPERATORS, {"col": torch.ones(7).char()}, ["col", "6", "7"]),
    (OPERATORS, {"first_row": -1}, ["first_row", "-1"]),
    (OPERATORS, {"first_column": -1}, ["first_column", "-1"]),
    (OPERATORS, {"first_column": 1}, ["first_column", "[0, 0]", "1"]),
    (OPERATORS[:2], {"x": torch.ones(4, 7)}, ["x", "8", "(4, 7)"]),
    (OPERATORS[:2], {"x": torch.ones(4, 8).int()}, ["x", "int32"]),
    (OPERATORS[:2], {"x": torch.ones(4, 8).half()}, ["float16", "float32"]),
    (OPERATORS, {"weight": torch.ones(1, 8)}, ["weight", "(6, 8)", "(1, 8)"]),
    (OPERATORS[:2], {"weight": torch.ones(6, 8).double()}, ["weight", "float64", "float32"]),
    (OPERATORS[:1], {"bias": torch.ones(1)}, ["bias", "6", "(1)"]),
    (OPERATORS[:1], {"weight": None}, ["bias", "without a weight"]),
    (OPERATORS[1:2], {"weight": None, "merge": True}, ["merge", "weight", "None"]),
    (OPERATORS[1:2], {"dy": torch.ones(4, 5)}, ["dy", "(4, 5)"]),
    (OPERATORS[1:2], {"dy": torch.ones(3, 6)}, ["dy", "(3, 6)", "(4, 8)"]),
    (OPERATORS[1:2], {"dy": torch.ones(4, 6).double()}, ["dy", "float64"]),
]
# What plain torch finds itself, or need not know.
WRONG_FOR_KERNELS = [
    (OPERATORS[2:], {"rounding_seed": 3}, ["rounding_seed", "float32"]),
    (OPERATORS, {"first_row": 2**63 - 1}, ["first_row", "[0, 4294967288]", str(2**63 - 1)]),
    (OPERATORS, {"gam": torch.ones(2, 6, device="meta")}, ["gam", "meta", "cpu"]),
    (OPERATORS[2:], {"s": torch.ones(5).char()}, ["gam", "(2, 5)", "(2, 6)"]),
    (OPERATORS, {"s": torch.ones(6)}, ["s", "int8", "float32"]),
    (OPERATORS, {"s": torch.ones(12).char()[::2]}, ["s", "contiguous"]),
    (OPERATORS, {"s": torch.ones(6).char().to("meta")}, ["s", "meta", "cpu"]),
    (OPERATORS, {"row": torch.ones(8).short()}, ["row", "int8", "int16"]),
    (OPERATORS, {"row": torch.ones(2, 4).char()}, ["row", "(2, 4)"]),
    (OPERATORS, {"row": torch.ones(0).char()}, ["row"]),
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
    ops.hadamard_weight(W, layer.lam, layer.gam, *constants(layer), None).sum().backward()
    assert torch.equal(W.grad, torch.ones_like(W))
