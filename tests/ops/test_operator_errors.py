"""The raw operators refuse tensors that are not those of a basis."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from layer_cases import basis_arguments, make_layer, operator
from refusals import BASES, DENSE, HADAMARD, LISTS, PLANES, arguments, packed, refuses

from randlora_ext import Basis
from randlora_ext.ops import dense, hadamard

ops = torch.ops.randlora
ALL = pytest.mark.parametrize("basis", BASES, ids=lambda b: b.format)

# ---- packed lists and planes ---------------------------------------------------------------------


def malformed_sets():
    """Tensors of two formats at once, or not all of one."""
    lists, planes = packed(LISTS), packed(PLANES)
    yield {**planes, "b_planes": None}, "b_planes", "0 of the other four"
    yield {**lists, "b_planes": planes["b_planes"]}, "b_planes", "4 of the other four"
    yield {**lists, "b_col_index": None}, "b_planes", "3 of the other four"
    tables = torch.zeros(8, dtype=torch.int32)
    yield {**planes, "a_tables": tables}, "a_tables", "(8) int32"


def malformed_offsets():
    lists = packed(LISTS)
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


def malformed_indices():
    lists = packed(LISTS)
    for name in ("a_index", "b_row_index", "b_col_index"):
        index = lists[name]
        for bad, *expected in (
            (index.long(), name, "int64", "int16"),
            (index[:-1], name, str(len(index) - 1)),
            (index.int(), name, "int32", "int16"),
            (index.to("meta"), "meta", "cpu"),
            (torch.stack([index, index], 1)[:, 0], name, "contiguous"),
        ):
            yield {**lists, name: bad}, *expected
    for name, by, size in (("a", 6, "d = 6"), ("b_row", 6, "K = 6"), ("b_col", 8, "D = 8")):
        name = f"{name}_index"
        yield {**lists, name: lists[name] + by}, name, size


def malformed_planes():
    planes = packed(PLANES)
    of_b = planes["b_planes"]
    for bad, *expected in (
        (of_b.int(), "int32", "(2, D, 1)"),
        (of_b[:, :0].contiguous(), "(2, 0, 1)"),
        (of_b[0], "(8, 1)"),
    ):
        yield {**planes, "b_planes": bad}, "b_planes", *expected
    yield {**planes, "b_planes": of_b[:, :7].contiguous()}, "x", "in_features = 7"


def malformed_lists_of_a_beside_planes():
    planes = packed(PLANES)
    index = planes["a_index"].clone()
    index[:2] = index[:2].flip(0)
    yield {**planes, "a_index": index}, "a_index", "ascend"
    # Of a larger layer of r = 3.
    larger = packed(Basis(16, 12, 3, 1 / 3))
    of_a = {name: larger[name] for name in ("a_offset", "a_index")}
    yield {**planes, **of_a}, "a_index", "d = 6"


MALFORMED = [
    *malformed_sets(),
    *malformed_offsets(),
    *malformed_indices(),
    *malformed_planes(),
    *malformed_lists_of_a_beside_planes(),
]
EVERY_MALFORMED = pytest.mark.parametrize("case", MALFORMED, ids=lambda case: ", ".join(case[1:]))


def without_weight():
    given = {name: value for name, value in arguments().items() if name not in ("bias", "basis")}
    return given | {"weight": None}


@EVERY_MALFORMED
def test_malformed_packed(case):
    bases, *expected = case
    refuses(ops.independent_linear, without_weight() | {"bias": None, **bases}, *expected)


@EVERY_MALFORMED
def test_malformed_packed_in_backward(case):
    bases, *expected = case
    last = {"dy": torch.ones(4, 6), "need_dx": True, "need_dlam_dgam": True}
    refuses(ops.independent_linear_backward, without_weight() | bases | last, *expected)


def test_planes_that_share_a_bit_stay_in_memory():
    bases = packed(PLANES)
    bases["b_planes"] = torch.full_like(bases["b_planes"], -1)
    lam, gam = torch.ones(3, 2), torch.ones(2, 6)
    y = ops.independent_linear(torch.ones(40, 8), None, None, lam, gam, **bases)
    assert y.isfinite().all() and y.abs().max() <= 8 * 6 * 3


# ---- Hadamard bases ------------------------------------------------------------------------------

HADAMARD_OPERATORS = pytest.mark.parametrize(
    "name", ["hadamard_linear", "hadamard_linear_backward", "hadamard_weight"]
)
NOT_HADAMARD = [
    ({"lam": torch.ones(6)}, ["lam"]),
    ({"gam": torch.ones(2, 1)}, ["gam", "(2, 1)"]),
    ({"col_signs": torch.ones(7)}, ["col_signs", "6", "7"]),
    ({"a_signs": torch.ones(6).char()}, ["a_signs", "float32", "int8"]),
    ({"weight": torch.ones(1, 8)}, ["weight", "(6, 8)", "(1, 8)"]),
    ({"a_signs": torch.ones(5)}, ["a_signs", "d = 6", "(5)"]),
    ({"a_signs": torch.ones(12)[::2]}, ["a_signs", "contiguous"]),
    ({"a_signs": torch.ones(6).to("meta")}, ["a_signs", "meta", "cpu"]),
    ({"row_signs": torch.ones(0)}, ["row_signs"]),
    ({"row_signs": torch.ones(2, 4)}, ["row_signs", "(2, 4)"]),
    ({"weight": torch.ones(6, 8).int()}, ["weight", "int32"]),
]


def hadamard_arguments(name, change):
    given = arguments(HADAMARD) | packed(HADAMARD)
    given |= {"dy": torch.ones(4, 6), "need_dx": True, "need_dlam_dgam": True} | change
    return {each.name: given[each.name] for each in getattr(ops, name).default._schema.arguments}


@pytest.mark.parametrize("change, expected", NOT_HADAMARD)
@HADAMARD_OPERATORS
def test_hadamard_operators(name, change, expected):
    refuses(getattr(ops, name), hadamard_arguments(name, change), "randlora: ", *expected)


# ---- one tensor that is not what it should be ----------------------------------------------------


def odd(t):
    """Tensors that could stand by mistake where `t` belongs; some are right."""
    yield from (torch.ones(()), torch.ones(0), torch.ones(3), torch.ones(0, *t.shape[1:]))
    yield from (t.flatten(), t[None], t[None].repeat(2, *[1] * t.dim()))
    yield from (t[..., :-1], t[:-1], torch.cat([t, t]))
    yield from (t.to(dtype) for dtype in (torch.float64, torch.float16, torch.int32, torch.cfloat))
    yield t.to("meta")


def right_arguments(name, experts):
    basis = HADAMARD if "hadamard" in name else DENSE
    module = hadamard if basis is HADAMARD else dense
    good = arguments(basis) | module.basis_arguments(basis, "cpu", 1.0, torch.float32)
    good |= {"dy": torch.ones(4, 6), "need_dx": True, "need_dlam_dgam": True}
    good["grad"] = torch.ones(6, 6) if "scaled" in name else torch.ones(6, 8)
    if experts:
        for each in ("lam", "gam", "weight", "grad"):
            good[each] = torch.stack([good[each]] * 3)
    return {each.name: good[each.name] for each in getattr(ops, name).default._schema.arguments}


LAYERS = "hadamard_linear", "hadamard_weight", "scaled_basis", "dense_linear"
CASES = [(f"{name}{end}", False) for name in LAYERS for end in ("", "_backward")]
CASES += [("hadamard_weight", True), ("hadamard_weight_backward", True)]


@pytest.mark.parametrize("name, experts", CASES)
def test_an_odd_tensor_is_refused_by_an_error_of_ours(name, experts):
    """Not by one of some function of torch."""
    good, seen = right_arguments(name, experts), Counter()
    for argument, value in good.items():
        for other in odd(value) if isinstance(value, torch.Tensor) else ():
            try:
                getattr(ops, name)(**{**good, argument: other})
                seen["taken"] += 1
            except RuntimeError as error:
                assert "randlora: " in str(error)
                seen["refused"] += 1
    assert seen["taken"] > 2 and seen["refused"] > 20


# ---- packing, and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "op, values, expected",
    [
        ("pack_dense", (torch.randn(3, 3),), ["dense", "ternary", "(0, 1)"]),
        ("pack_dense", (torch.ones(3),), ["dense", "(3)", "(rows, cols)"]),
        ("pack_dense", (torch.ones(0, 3),), ["dense", "(0, 3)", "empty"]),
        ("pack_dense", (torch.ones(3, 3, dtype=torch.int64),), ["dense", "int64", "float32"]),
        ("planes_to_lists", (torch.zeros(2, 1, 1025).long(), 65537, False), ["65536", "65537"]),
        ("planes_to_lists", (torch.zeros(2, 65537, 1).long(), 1, True), ["65536", "65537"]),
        ("planes_to_lists", (torch.zeros(2, 1, 1).long(), 65, False), ["cols", "65"]),
        ("planes_to_lists", (torch.zeros(1, 1, 1).long(), 5, True), ["planes", "(1, 1, 1)"]),
        ("planes_to_dense", (torch.zeros(2, 1, 1).long(), 5, 1.0, torch.int32), ["dtype"]),
        ("planes_to_dense", (torch.zeros(2, 1, 1).long(), -1, 1.0, torch.half), ["cols", "-1"]),
        ("planes_to_dense", (torch.zeros(2, 0, (1 << 24) + 1).long(), (1 << 30) + 1, 1.0,
                             torch.half), ["cols", "1073741825", "2^30"]),
        ("support_tables", (torch.tensor([0, 1]), torch.zeros(1).short(), 3), ["a_offset", "(2)"]),
        ("support_tables", (torch.tensor([0, 1, 1]), torch.zeros(1).int(), 3), ["int32", "int16"]),
        ("support_tables", (torch.tensor([0, 2, 1]), torch.zeros(1).short(), 3), ["decrease"]),
        ("support_tables", (torch.tensor([0, 1, 1]), torch.zeros(1).short(), 0), ["d must be"]),
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
    inputs = dy, layer.x, layer.weight, layer.lam, layer.gam, *basis_arguments(layer), True, True
    refuses(lambda: operator(basis, "linear_backward")(*inputs), {}, *expected)
