"""Bad input raises an exception that names the argument, what it was and what is allowed."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from layer_cases import make_basis, make_layer, operands, operator

from randlora_ext import Basis, delta_weight, linear, merged_weight, scaled_basis
from randlora_ext.ops import dense, hadamard, independent

ops = torch.ops.randlora
ERRORS = (ValueError, TypeError, RuntimeError)
# in = 8, out = 6, r = 3: d = 6, D = 8, n = 2, K = 6
LISTS, PLANES, HADAMARD, DENSE = BASES = [
    make_basis(8, 6, 3, kind, dtype=torch.float32) for kind in (0.1, 0.5, "hadamard", "dense")
]
ALL = pytest.mark.parametrize("basis", BASES, ids=lambda b: b.format)


def arguments(basis=LISTS):
    layer = make_layer(8, 6, 3, 0.5, 4, torch.float32)
    names = ("x", "weight", "bias", "basis", "lam", "gam")
    return {name: getattr(layer, name) for name in names} | {"basis": basis}


def refuses(function, arguments_, *expected):
    """function raises a message that contains every expected text; no tensor is changed."""
    tensors = [t for t in arguments_.values() if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors if not t.is_meta]
    with pytest.raises(ERRORS) as raised:
        function(**arguments_)
    message = str(raised.value).replace(",)", ")")  # of a shape that Python prints
    for text in expected:
        assert text in message, f"{text!r} is not in: {message}"
    for tensor, copy in zip((t for t in tensors if not t.is_meta), before, strict=True):
        assert torch.equal(tensor, copy)


DIAGONALS = [
    ({"lam": torch.ones(2, 3)}, ["lam", "(2, 3)", "(3, 2)"]),
    ({"lam": torch.ones(3)}, ["lam", "(3)", "(3, 2)"]),
    ({"lam": torch.ones(3, 2, dtype=torch.int64)}, ["lam", "int64", "floating"]),
    ({"lam": [1.0]}, ["lam", "list", "tensor"]),
    ({"gam": torch.ones(2, 8)}, ["gam", "(2, 8)", "(2, 6)"]),
    ({"gam": torch.ones(2, 6, dtype=torch.bool)}, ["gam", "bool", "floating"]),
    ({"gam": None}, ["gam", "NoneType", "tensor"]),
    ({"gam": torch.ones(2, 6, device="meta")}, ["gam", "meta", "cpu"]),
]


@pytest.mark.parametrize(
    "input_scale, expected",
    [
        (torch.ones(6), ["input_scale", "(in) = (8)", "(6)"]),
        (torch.ones(1), ["input_scale", "(in) = (8)", "(1)"]),
        (torch.ones(8, dtype=torch.float64), ["input_scale", "float32", "float64"]),
        (torch.ones(8, requires_grad=True), ["input_scale", "a constant", "requires a gradient"]),
        ([1.0] * 8, ["input_scale", "tensor", "list"]),
    ],
    ids=str,
)
def test_input_scale(input_scale, expected):
    good = arguments(HADAMARD) | {"input_scale": input_scale}
    refuses(linear, good, *expected)
    of_delta = "basis", "lam", "gam", "input_scale"
    refuses(delta_weight, {k: good[k] for k in of_delta}, *expected)
    refuses(merged_weight, {k: good[k] for k in ("weight", *of_delta)}, *expected)
    other = arguments(LISTS) | {"input_scale": torch.ones(8)}
    refuses(linear, other, "input_scale goes with Hadamard bases, got kind='independent'")


@ALL
@pytest.mark.parametrize("change, expected", DIAGONALS)
def test_diagonals(basis, change, expected):
    good = {**arguments(basis), **change}
    refuses(linear, good, *expected)
    refuses(delta_weight, {k: good[k] for k in ("basis", "lam", "gam")}, *expected)
    refuses(merged_weight, {k: good[k] for k in ("basis", "weight", "lam", "gam")}, *expected)
    shown = expected[:2]  # a dense A does not tell n
    refuses(scaled_basis, {"basis_or_A": basis, "lam": good["lam"], "gam": good["gam"]}, *shown)


@ALL
@pytest.mark.parametrize(
    "scaling, got",
    [
        (torch.ones(2), "tensor([1., 1.])"),
        (torch.tensor(1.0), "tensor(1.)"),
        ([1.0, 2.0], "[1.0, 2.0]"),
        ("2", "'2'"),
        (None, "None"),
        (True, "True"),
        (2.0 + 1j, "(2+1j)"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        pytest.param(10**400, "an integer of 1329 bits", id="huge"),
    ],
)
def test_scaling(basis, scaling, got):
    good = arguments(basis) | {"scaling": scaling}
    told = f"scaling must be a finite number, got {got}"
    refuses(linear, good, told)
    refuses(delta_weight, {k: good[k] for k in ("basis", "lam", "gam", "scaling")}, told)
    del good["x"], good["bias"]
    refuses(merged_weight, good, told)


@ALL
def test_a_whole_number_scales_as_its_float(basis):
    layer = arguments(basis)
    given = layer["basis"], layer["lam"], layer["gam"]
    assert torch.equal(delta_weight(*given, 2), delta_weight(*given, 2.0))


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"x": torch.ones(4, 8, dtype=torch.complex64)}, ["x", "complex64", "float"]),
        ({"x": torch.ones(4, 7)}, ["x", "(4, 7)", "8"]),
        ({"x": torch.ones(())}, ["x", "()", "8"]),
        ({"x": [1.0]}, ["x", "list", "tensor"]),
        ({"x": torch.ones(4, 8, device="meta")}, ["x", "meta", "cpu"]),
        ({"weight": torch.ones(8, 6)}, ["weight", "(8, 6)", "(6, 8)"]),
        ({"weight": torch.ones(6)}, ["weight", "(6)", "(6, 8)"]),
        ({"weight": torch.ones(6, 8).double()}, ["weight", "float64", "float32"]),
        ({"weight": torch.ones(6, 8, device="meta")}, ["weight", "meta", "cpu"]),
        ({"bias": torch.ones(1)}, ["bias", "(1)", "(6)"]),  # torch would broadcast it
        ({"bias": torch.ones(6).half()}, ["bias", "float16"]),
        ({"bias": torch.ones(6, device="meta")}, ["bias", "meta", "cpu"]),
        ({"weight": None}, ["weight"]),  # a bias of its own has no base output to go to
        ({"basis": None}, ["basis must be a Basis", "NoneType"]),
    ],
)
@ALL
def test_linear(basis, change, expected):
    if basis is not DENSE and expected[-1] == "float":
        expected = [*expected[:-1], "float32"]
    good = {**arguments(basis), **change}
    refuses(linear, good, *expected)
    if change.keys() == {"weight"} and expected[-1] == "(6, 8)":
        del good["x"], good["bias"]
        refuses(merged_weight, good, *expected)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"A": torch.ones(3, 6, dtype=torch.int32)}, ["A", "int32", "float32"]),
        ({"A": torch.ones(3, 1, 6)}, ["A", "(3, 1, 6)", "(r, d)"]),
        ({"A": torch.ones(3, 7)}, ["gam", "(2, 6)", "(2, 7)"]),
        ({"A": torch.ones(4, 6)}, ["lam", "(3, 2)", "r = 4"]),
        ({"gam": torch.ones(2, 5)}, ["gam", "(2, 5)", "(2, 6)"]),
        ({"A": torch.ones(3, 6, device="meta")}, ["A", "meta", "cpu"]),
        ({"lam": torch.ones(3, 2, device="meta")}, ["lam", "meta", "cpu"]),
    ],
)
def test_scaled_basis_of_a_dense_matrix(change, expected):
    good = {"A": torch.ones(3, 6), "lam": torch.ones(3, 2), "gam": torch.ones(2, 6), **change}
    refuses(ops.scaled_basis, good, *expected)
    refuses(ops.scaled_basis_backward, {**good, "grad": torch.ones(6, 6)}, *expected)


# ---- raw operators: packed tensors that are not those of a basis


def packed(basis):
    """The operators' arguments that describe the bases."""
    return (hadamard if basis is HADAMARD else independent).operands(basis, "cpu")


def malformed():
    lists, planes = packed(LISTS), packed(PLANES)
    yield {**planes, "b_planes": None}, "b_planes", "0 of the other four"
    yield {**lists, "b_planes": planes["b_planes"]}, "b_planes", "4 of the other four"
    yield {**lists, "b_col_index": None}, "b_planes", "3 of the other four"
    tables = torch.zeros(8, dtype=torch.int32)
    yield {**planes, "a_tables": tables}, "a_tables", "(8) int32"
    for name in ("a_offset", "b_row_offset", "b_col_offset"):
        offset = lists[name]
        few, place = len(offset) - 2, torch.arange(len(offset))
        # Both lead out of memory; the steps of the second are positive modulo 2 ** 64.
        falls = torch.cat([offset[:1], offset[-1] + torch.arange(few).flip(0), offset[-1:]])
        wraps = torch.tensor([0, 2**62, -(2**63), -(2**62), *[0] * (few - 3), offset[-1]])
        for bad, *expected in (
            (offset.int(), "int32", "int64"),
            (offset[:-1], f"({len(offset) - 1})"),
            (offset[None], f"(1, {len(offset)})"),
            (offset - (place == few + 1).long(),),
            (offset + (place == 0).long(), "0", "1"),
            (falls,),
            (wraps,),
        ):
            yield {**lists, name: bad}, name, *expected
    for name in ("a_index", "b_row_index", "b_col_index"):
        index = lists[name]
        for bad, *expected in (
            (index.long(), name, "int64", "int16"),
            (index[:-1], name, str(len(index) - 1)),
            (index.int(), "int32", "int16"),
            (index.to("meta"), "meta", "cpu"),
            (torch.stack([index, index], 1)[:, 0], name, "contiguous"),
        ):
            yield {**lists, name: bad}, *expected
    of_b = planes["b_planes"]
    for bad, *expected in (
        (of_b.int(), "int32", "(2, D, 1)"),
        (of_b[:, :0].contiguous(), "(2, 0, 1)"),
        (of_b[0], "(8, 1)"),
    ):
        yield {**planes, "b_planes": bad}, "b_planes", *expected
    index = planes["a_index"].clone()
    index[:2] = index[:2].flip(0)
    for bad in (index, index.int()):
        yield {**planes, "a_index": bad}, "a_index", "ascend"
    # Of a larger layer of r = 3, and with one column past the end.
    larger = packed(Basis(16, 12, 3, 1 / 3))
    of_a = {name: larger[name] for name in ("a_offset", "a_index")}
    yield {**planes, **of_a}, "a_index", "d = 6"
    yield {**planes, "b_planes": of_b[:, :7].contiguous()}, "x", "in_features = 7"
    for name, by, size in (("a", 6, "d = 6"), ("b_row", 6, "K = 6"), ("b_col", 8, "D = 8")):
        name = f"{name}_index"
        yield {**lists, name: lists[name] + by}, name, size


@pytest.mark.parametrize("case", malformed(), ids=lambda case: ", ".join(case[1:]))
def test_malformed_packed(case):
    bases, *expected = case
    common = {k: v for k, v in arguments().items() if k not in ("bias", "basis")}
    common["weight"] = None
    refuses(ops.independent_linear, {**common, "bias": None, **bases}, *expected)
    last = {"dy": torch.ones(4, 6), "need_x": True, "need_diagonals": True}
    refuses(ops.independent_linear_backward, {**common, **bases, **last}, *expected)


@pytest.mark.parametrize(
    "change, expected, by_both",
    [
        ({"lam": torch.ones(6)}, ["lam"], True),
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
def test_hadamard_operators(change, expected, by_both):
    good = {**arguments(HADAMARD), "dy": torch.ones(4, 6), "need_x": True, "need_diagonals": True}
    good |= packed(HADAMARD) | change
    for name in ("hadamard_linear", "hadamard_linear_backward", "hadamard_weight"):
        op = getattr(ops, name)
        inputs = {each.name: good[each.name] for each in op.default._schema.arguments}
        refuses(op, inputs, "randlora: ", *expected)
        if by_both:
            refuses(getattr(hadamard, name.replace("hadamard", "_plain")), inputs, *expected[:2])


def odd(t):
    """Tensors that could stand by mistake where `t` belongs; some are right."""
    yield from (torch.ones(()), torch.ones(0), torch.ones(3), torch.ones(0, *t.shape[1:]))
    yield from (t.flatten(), t[None], t[None].repeat(2, *[1] * t.dim()))
    yield from (t[..., :-1], t[:-1], torch.cat([t, t]))
    yield from (t.to(dtype) for dtype in (torch.float64, torch.float16, torch.int32, torch.cfloat))
    yield t.to("meta")


PLAIN = {
    "hadamard_linear": (hadamard._plain_linear, HADAMARD),
    "hadamard_linear_backward": (hadamard._plain_linear_backward, HADAMARD),
    "hadamard_weight": (hadamard._plain_weight, HADAMARD),
    "hadamard_weight_backward": (hadamard._plain_weight_backward, HADAMARD),
    "scaled_basis": (dense._plain_scaled_basis, DENSE),
    "scaled_basis_backward": (dense._plain_scaled_basis_backward, DENSE),
    "dense_linear": (dense._dense_linear, DENSE),
    "dense_linear_backward": (dense._dense_linear_backward, DENSE),
}


@pytest.mark.parametrize(
    "name, experts",
    [(name, False) for name in PLAIN]
    + [("hadamard_weight", True), ("hadamard_weight_backward", True)],
)
def test_plain_torch_refuses_what_kernels_refuse(name, experts):
    """With an error of ours, not one of some function of torch, and takes what they take."""
    plain, basis = PLAIN[name]
    module = hadamard if basis is HADAMARD else dense
    good = arguments(basis) | module.operands(basis, "cpu", 1.0, torch.float32)
    good |= {"dy": torch.ones(4, 6), "need_x": True, "need_diagonals": True}
    good["grad"] = torch.ones(6, 6) if "scaled" in name else torch.ones(6, 8)
    if experts:
        for each in ("lam", "gam", "weight", "grad"):
            good[each] = torch.stack([good[each]] * 3)
    kernel = getattr(ops, name)
    good = {each.name: good[each.name] for each in kernel.default._schema.arguments}
    seen = Counter()
    for argument, value in good.items():
        for other in odd(value) if isinstance(value, torch.Tensor) else ():
            inputs = {**good, argument: other}
            taken = name.startswith("dense")  # which has no kernels
            if not taken:
                try:
                    kernel(**inputs)
                    taken = True
                except RuntimeError as error:
                    assert "randlora: " in str(error)
            try:
                plain(**inputs)
                seen["taken"] += 1
                assert taken, f"{argument} {tuple(other.shape)} {other.dtype} {other.device}"
            except RuntimeError as error:
                assert str(error).startswith("randlora: ")
                seen["refused"] += 1
                assert not taken or name.startswith("dense"), str(error)
    assert seen["taken"] > 2 and seen["refused"] > 20


def wrong_lists(offset, index, *expected, device="cpu"):
    offset = torch.tensor(offset, device=device)
    return "lists_to_dense", (offset, index, 3, 1.0, torch.half), expected


@pytest.mark.parametrize(
    "op, values, expected",
    [
        ("pack_dense", (torch.randn(3, 3),), ["dense", "ternary", "(0, 1)"]),
        ("pack_dense", (torch.ones(3),), ["dense", "(3)", "(rows, cols)"]),
        ("pack_dense", (torch.ones(0, 3),), ["dense", "(0, 3)", "empty"]),
        ("pack_dense", (torch.ones(3, 3, dtype=torch.int64),), ["dense", "int64", "float32"]),
        ("planes_to_lists", (torch.zeros(2, 1, 1025).long(), 65537, False, False), ["65536"]),
        ("planes_to_lists", (torch.zeros(2, 1, 1).long(), 65, False, False), ["cols", "65"]),
        ("planes_to_lists", (torch.zeros(1, 1, 1).long(), 5, True, True), ["planes", "(1, 1, 1)"]),
        ("planes_to_dense", (torch.zeros(2, 1, 1).long(), 5, 1.0, torch.int32), ["dtype"]),
        ("planes_to_dense", (torch.zeros(2, 1, 1).long(), -1, 1.0, torch.half), ["cols", "-1"]),
        ("planes_to_dense", (torch.zeros(2, 0, (1 << 24) + 1).long(), (1 << 30) + 1, 1.0,
                             torch.half), ["cols", "1073741825", "2^30"]),
        ("lists_to_dense", (torch.zeros(1).long(), torch.zeros(0).short(), (1 << 30) + 1, 1.0,
                            torch.half), ["cols", "1073741825", "2^30"]),
        wrong_lists([0, 1], torch.zeros(1).short(), "offset", "(2)"),
        wrong_lists([0, 1, 1], torch.zeros(2).short(), "offset", "2", "1"),
        wrong_lists([0, 2, 1], torch.zeros(1).short(), "offset", "decrease", "2"),
        wrong_lists([0, 1, 1], torch.ones(1).short() * 3, "index", "3"),
        wrong_lists([0, 1, 1], torch.zeros(1).long(), "index", "int64", "int16"),
        wrong_lists([0, 1, 1], torch.zeros(1).short().to("meta"), "index", "meta", "offset", "cpu"),
        wrong_lists([0, 1, 1], torch.zeros(1).short(), "one device", device="meta"),
    ],
)  # fmt: skip
def test_packing_operators(op, values, expected):
    refuses(lambda: getattr(ops, op)(*values), {}, *expected)


@ALL
@pytest.mark.parametrize(
    "dy, expected",
    [
        (torch.ones(4, 5), ["dy", "(4, 5)", "6"]),
        (torch.ones(3, 6), ["dy", "(3, 6)", "(4, 8)"]),
        (torch.ones(6), ["dy", "(6)", "(4, 8)"]),
        (torch.ones(4, 6).double(), ["dy", "float64", "float32"]),
    ],
)
def test_a_gradient_that_does_not_fit(basis, dy, expected):
    layer = replace(make_layer(8, 6, 3, 0.5, 4, torch.float32), basis=basis)
    inputs = dy, layer.x, layer.weight, layer.lam, layer.gam, *operands(layer), True, True
    refuses(lambda: operator(basis, "linear_backward")(*inputs), {}, *expected)


def test_planes_that_share_a_bit_stay_in_memory():
    bases = packed(PLANES)
    bases["b_planes"] = torch.full_like(bases["b_planes"], -1)
    lam, gam = torch.ones(3, 2), torch.ones(2, 6)
    y = ops.independent_linear(torch.ones(40, 8), None, None, lam, gam, **bases)
    assert y.isfinite().all() and y.abs().max() <= 8 * 6 * 3


def test_torch_jit_trace_is_refused_by_name():
    layer = make_layer(8, 8, 2, 0.5, 3, torch.float32)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record .* torch\.export"):
        torch.jit.trace(lambda x: linear(x, None, None, layer.basis, layer.lam, layer.gam), layer.x)
