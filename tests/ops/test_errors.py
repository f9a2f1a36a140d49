"""Bad input raises an exception that names the argument, what it was and what is allowed."""

import pytest
import torch
from layer_cases import make_basis, make_layer
from randlora_ext.ops.ternary import operands

from randlora_ext import TernaryBasis, delta_weight, explain, linear, scaled_basis

ops = torch.ops.randlora
ERRORS = (ValueError, TypeError, RuntimeError)
# in = 8, out = 6, r = 3: d = 6, D = 8, n = 2, K = 6
LISTS, PLANES = (TernaryBasis(8, 6, 3, density) for density in (0.1, 0.5))
HADAMARD, DENSE = (make_basis(8, 6, 3, kind, dtype=torch.float32) for kind in ("hadamard", "dense"))
BASES = [LISTS, PLANES, HADAMARD, DENSE]
ALL = pytest.mark.parametrize("basis", BASES, ids=lambda b: b.format)


def arguments(basis=LISTS):
    layer = make_layer(8, 6, 3, 0.5, 4, torch.float32)
    layer.basis = basis
    return {name: getattr(layer, name) for name in ("x", "weight", "bias", "basis", "lam", "gam")}


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
    ({"gam": torch.ones(6, 2)}, ["gam", "(6, 2)", "(2, 6)"]),
    ({"gam": torch.ones(2, 6, dtype=torch.bool)}, ["gam", "bool", "floating"]),
    ({"gam": None}, ["gam", "NoneType", "tensor"]),
    ({"gam": torch.ones(2, 6, device="meta")}, ["gam", "meta", "cpu"]),
]


@ALL
@pytest.mark.parametrize("change, expected", DIAGONALS)
def test_diagonals(basis, change, expected):
    good = {**arguments(basis), **change}
    refuses(linear, good, *expected)
    refuses(delta_weight, {k: good[k] for k in ("basis", "lam", "gam")}, *expected)
    shown = expected[:2]  # a dense A does not tell n
    refuses(scaled_basis, {"basis_or_A": basis, "lam": good["lam"], "gam": good["gam"]}, *shown)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"x": torch.ones(4, 8, dtype=torch.int64)}, ["x", "int64", "float"]),
        ({"x": torch.ones(4, 8, dtype=torch.complex64)}, ["x", "complex64", "float"]),
        ({"x": torch.ones(4, 7)}, ["x", "(4, 7)", "in_features", "8"]),
        ({"x": torch.ones(())}, ["x", "()", "in_features", "8"]),
        ({"x": [1.0]}, ["x", "list", "tensor"]),
        ({"x": torch.ones(4, 8, device="meta")}, ["x", "meta", "cpu"]),
        ({"weight": torch.ones(8, 6)}, ["weight", "(8, 6)", "(6, 8)"]),
        ({"weight": torch.ones(6)}, ["weight", "(6)", "(6, 8)"]),
        ({"weight": torch.ones(6, 8).double()}, ["weight", "float64", "float32"]),
        ({"weight": torch.ones(6, 8, device="meta")}, ["weight", "meta", "cpu"]),
        ({"bias": torch.ones(8)}, ["bias", "(8)", "(6)"]),
        ({"bias": torch.ones(1)}, ["bias", "(1)", "(6)"]),  # torch would broadcast it
        ({"bias": torch.ones(6).half()}, ["bias", "float16"]),
        ({"bias": torch.ones(6, device="meta")}, ["bias", "meta", "cpu"]),
        ({"weight": None}, ["weight"]),  # a bias of its own has no base output to go to
        ({"weight": None, "bias": None, "path": "merged"}, ["merge", "weight"]),
        ({"path": "Factored"}, ["path", "'Factored'", "'factored'", "'merged'"]),
        ({"path": ""}, ["path", "''", "'factored'", "'merged'"]),
        ({"basis": None}, ["basis must be a TernaryBasis", "NoneType"]),
    ],
)
@ALL
def test_linear(basis, change, expected):
    if basis is not DENSE and expected[-1] == "float":
        expected = [*expected[:-1], "float32"]
    for path in ("factored", "merged", "auto", *["delta"] * (basis is not HADAMARD)):
        refuses(linear, {**arguments(basis), "path": path, **change}, *expected)


def test_environment_path(monkeypatch):
    monkeypatch.setenv("RANDLORA_PATH", "Merged")
    names = "auto", "factored", "delta", "merged"
    refuses(linear, arguments(), "RANDLORA_PATH", "Merged", *names)
    with pytest.raises(ValueError, match="RANDLORA_PATH.*" + ".*".join(names)):
        explain(LISTS, 1)
    linear(**arguments(), path="delta")  # an explicit path does not ask the environment


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"A": torch.ones(3, 6, dtype=torch.int32)}, ["A", "int32", "float32"]),
        ({"A": torch.ones(3, 6, dtype=torch.complex64)}, ["A", "complex64", "float32"]),
        ({"A": torch.ones(3, 1, 6)}, ["A", "(3, 1, 6)", "(r, d)"]),
        ({"A": torch.ones(3, 7)}, ["gam", "(2, 6)", "(2, 7)"]),
        ({"A": torch.ones(4, 6)}, ["lam", "(3, 2)", "r = 4"]),
        ({"lam": torch.ones(3, 3)}, ["gam", "(2, 6)", "(3, 6)"]),
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


def replaced(packed, position, tensor):
    return [tensor if k == position else t for k, t in enumerate(packed)]


def shifted(offset, position, by):
    offset = offset.clone()
    offset[position] += by
    return offset


def malformed():
    lists, planes = LISTS.packed("cpu"), PLANES.packed("cpu")
    yield "lists", lists[:6], "got 6", "7", "lists"
    yield "planes", [], "got 0", "4", "planes"
    yield "lists", planes, "got 4", "7", "lists"
    yield "dense", planes, "format", "'lists' or 'planes'", "dense"
    tables = torch.zeros(8, dtype=torch.int32)
    yield "planes", replaced(planes, 2, tables), "support tables", "(8) int32"
    for at, name in ((0, "a_offset"), (3, "b_row_offset"), (5, "b_col_offset")):
        offset, few = lists[at], len(lists[at]) - 2
        # Both lead out of memory; the steps of the second are positive modulo 2 ** 64.
        falls = torch.cat([offset[:1], offset[-1] + torch.arange(few).flip(0), offset[-1:]])
        wraps = torch.tensor([0, 2**62, -(2**63), -(2**62), *[0] * (few - 3), offset[-1]])
        for bad, *expected in (
            (offset.int(), "int32", "int64"),
            (offset[:-1], f"({len(offset) - 1})"),
            (offset[None], f"(1, {len(offset)})"),
            (shifted(offset, -1, -1),),
            (shifted(offset, 0, 1), "0", "1"),
            (falls,),
            (wraps,),
        ):
            yield "lists", replaced(lists, at, bad), name, *expected
    for at, name in ((1, "a_index"), (4, "b_row_index"), (6, "b_col_index")):
        index = lists[at]
        for bad, *expected in (
            (index.long(), name, "int64", "int16"),
            (index[:-1], name, str(len(index) - 1)),
            (index.int(), "int32", "int16"),
            (index.to("meta"), "meta", "cpu"),
            (torch.stack([index, index], 1)[:, 0], name, "contiguous"),
        ):
            yield "lists", replaced(lists, at, bad), *expected
    of_b = planes[3]
    for bad, *expected in (
        (of_b.int(), "int32", "(2, 8, 1)"),
        (of_b[:, :7].contiguous(), "(2, 7, 1)"),
        (of_b[0], "(8, 1)"),
    ):
        yield "planes", replaced(planes, 3, bad), "b_planes", *expected
    # Of a larger layer of r = 3, and with one column past the end.
    larger = TernaryBasis(16, 12, 3, 1 / 3).packed("cpu")
    yield "planes", [*larger[:2], *planes[2:]], "a_index", "d = 6"
    yield "lists", replaced(lists, 1, lists[1] + 6), "a_index", "d = 6"
    yield "lists", replaced(lists, 4, lists[4] + 6), "b_row_index", "K = 6"
    yield "lists", replaced(lists, 6, lists[6] + 8), "b_col_index", "D = 8"


@pytest.mark.parametrize("case", malformed(), ids=lambda case: ", ".join(case[2:]))
def test_malformed_packed(case):
    format, packed, *expected = case
    expected = expected if expected[0] == "format" else ["packed", *expected]
    lam, gam, x, dy = torch.ones(3, 2), torch.ones(2, 6), torch.ones(4, 8), torch.ones(4, 6)
    bases = packed, format, 8, False, 1.0
    calls = {
        ops.delta_weight: (lam, gam, *bases),
        ops.delta_weight_backward: (torch.ones(6, 8), lam, gam, *bases),
        ops.linear: (x, None, None, lam, gam, *bases, "factored", None),
        ops.linear_backward: (dy, x, None, lam, gam, *bases, "factored", None, True, True),
    }
    for op, values in calls.items():
        refuses(lambda op=op, values=values: op(*values), {}, *expected)


@pytest.mark.parametrize("position, name", [(1, "a_index"), (4, "b_row_index")])
@pytest.mark.parametrize("wide", [False, True])
def test_positions_ascend(position, name, wide):
    basis = TernaryBasis(96, 60, 4, 0.1)
    packed = [t.int() if wide and t.dtype == torch.int16 else t for t in basis.packed("cpu")]
    offset, index = packed[position - 1], packed[position].clone()
    start = int(offset[int((offset.diff() > 1).nonzero()[0])])
    index[[start, start + 1]] = index[[start + 1, start]]
    packed[position] = index
    lam, gam, W = torch.ones(4, basis.n), torch.ones(basis.n, 60), torch.ones(60, 96)
    x, dy = torch.ones(4, 96), torch.ones(4, 60)
    bases = packed, "lists", 96, False, 1.0
    calls = [
        lambda: ops.delta_weight(lam, gam, *bases),
        lambda: ops.delta_weight_backward(W, lam, gam, *bases),
        lambda: ops.linear(x, W, None, lam, gam, *bases, "merged", None),
    ]
    if name == "a_index":  # B's are read in any order where dW is not formed
        last = *bases, "factored", None
        calls += [
            lambda: ops.linear(x, W, None, lam, gam, *last),
            lambda: ops.linear_backward(dy, x, W, lam, gam, *last, True, True),
        ]
    for call in calls:
        refuses(call, {}, "packed", name, "ascend")


@pytest.mark.parametrize(
    "lam, gam, D, expected",
    [
        ((3, 2), (2, 7), 8, ["gam", "K = r * n = 6", "(2, 7)"]),
        ((3, 2), (3, 6), 8, ["gam", "n = 2", "(3, 6)"]),
        ((3, 3), (3, 6), 8, ["packed", "b_col_offset"]),
        ((4, 2), (2, 6), 8, ["packed", "a_offset"]),
        ((3, 2), (2, 6), 9, ["packed", "b_row_offset"]),
        ((3, 2), (2, 6), 0, ["D", "positive", "0"]),
        ((3, 2), (2, 6), -8, ["D", "positive", "-8"]),
    ],
)
def test_wrong_sizes(lam, gam, D, expected):
    bases = operands(LISTS, "cpu")._replace(D=D)
    refuses(lambda: ops.delta_weight(torch.ones(lam), torch.ones(gam), *bases), {}, *expected)


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
        ("add_rounded", (torch.ones(2, 3).half(), torch.ones(3, 2), None),
         ["delta", "(2, 3)", "(3, 2)"]),
        ("planes_to_lists", (torch.zeros(2, 1, 1025).long(), 65537, False, False), ["65536"]),
        ("planes_to_lists", (torch.zeros(2, 1, 1).long(), 65, False, False), ["cols", "65"]),
        ("planes_to_lists", (torch.zeros(1, 1, 1).long(), 5, True, True), ["planes", "(1, 1, 1)"]),
        ("planes_to_dense", (torch.zeros(2, 1, 1).long(), 5, 1.0, torch.int32), ["dtype"]),
        ("planes_to_dense", (torch.zeros(2, 1, 1).long(), -1, 1.0, torch.half), ["cols", "-1"]),
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


@pytest.mark.parametrize(
    "dy, expected",
    [
        (torch.ones(4, 5), ["dy", "(4, 5)", "6"]),
        (torch.ones(3, 6), ["dy", "(3, 6)", "(4, 8)"]),
        (torch.ones(6), ["dy", "(6)", "(4, 8)"]),
        (torch.ones(4, 6).double(), ["dy", "float64", "float32"]),
    ],
)
def test_a_gradient_that_does_not_fit(dy, expected):
    good = arguments()
    inputs = dy, *(good[name] for name in ("x", "weight", "lam", "gam"))
    last = *operands(LISTS, "cpu"), "factored", None, True, True
    refuses(lambda: ops.linear_backward(*inputs, *last), {}, *expected)


@pytest.mark.parametrize("path", ["factored", "delta"])
def test_planes_that_share_a_bit_stay_in_memory(path):
    bases = operands(PLANES, "cpu")
    both = bases._replace(packed=replaced(bases.packed, 3, torch.full_like(bases.packed[3], -1)))
    lam, gam = torch.ones(3, 2), torch.ones(2, 6)
    y = ops.linear(torch.ones(40, 8), None, None, lam, gam, *both, path, None)
    assert y.isfinite().all() and y.abs().max() <= 8 * 6 * 3


def test_torch_jit_trace_is_refused_by_name():
    layer = make_layer(8, 8, 2, 0.5, 3, torch.float32)
    with pytest.raises(RuntimeError, match="does not support torch.jit.trace; use torch.export"):
        torch.jit.trace(lambda x: linear(x, None, None, layer.basis, layer.lam, layer.gam), layer.x)
    assert not torch.jit.is_tracing()
