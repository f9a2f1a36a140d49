"""Bad input of a function raises an error that names the argument, what it was and is allowed."""

import math

import pytest
import torch
from layer_cases import make_layer
from refusals import BASES, DENSE, HADAMARD, LISTS, arguments, refuses

from randlora_ext import delta_weight, linear

ops = torch.ops.randlora
ALL = pytest.mark.parametrize("basis", BASES, ids=lambda b: b.format)

OF_DELTA = "basis", "lam", "gam"
# By name: the function, and its arguments besides scaling and input_scale.
FUNCTIONS = {
    "linear": (linear, ("x", "weight", "bias", *OF_DELTA)),
    "delta_weight": (delta_weight, OF_DELTA),
}
EVERY_FUNCTION = pytest.mark.parametrize("function, names", FUNCTIONS.values(), ids=FUNCTIONS)


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


@EVERY_FUNCTION
@ALL
@pytest.mark.parametrize("change, expected", DIAGONALS)
def test_diagonals(basis, change, expected, function, names):
    given = arguments(basis) | change
    refuses(function, {name: given[name] for name in names}, *expected)


@EVERY_FUNCTION
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
def test_input_scale(input_scale, expected, function, names):
    given = arguments(HADAMARD)
    refuses(
        function, {name: given[name] for name in names} | {"input_scale": input_scale}, *expected
    )


def test_input_scale_beside_independent_bases():
    given = arguments(LISTS) | {"input_scale": torch.ones(8)}
    refuses(linear, given, "input_scale goes with Hadamard bases, got kind='independent'")


@EVERY_FUNCTION
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
def test_scaling(basis, scaling, got, function, names):
    given = {name: value for name, value in arguments(basis).items() if name in names}
    refuses(function, given | {"scaling": scaling}, f"scaling must be a finite number, got {got}")


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
    refuses(linear, arguments(basis) | change, *expected)


OF_A = pytest.mark.parametrize(
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
GOOD = {"A": torch.ones(3, 6), "lam": torch.ones(3, 2), "gam": torch.ones(2, 6)}


@OF_A
def test_scaled_basis_of_a_dense_matrix(change, expected):
    refuses(ops.scaled_basis, GOOD | change, *expected)


@OF_A
def test_scaled_basis_backward_of_a_dense_matrix(change, expected):
    refuses(ops.scaled_basis_backward, GOOD | change | {"grad": torch.ones(6, 6)}, *expected)


def test_torch_jit_trace_is_refused_by_name():
    layer = make_layer(8, 8, 2, 0.5, 3, torch.float32)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record .* torch\.export"):
        torch.jit.trace(lambda x: linear(x, None, None, layer.basis, layer.lam, layer.gam), layer.x)


def test_a_nested_tensor_is_refused_by_name():
    layer = make_layer(8, 8, 2, 0.5, 3, torch.float32)
    nested = torch.nested.nested_tensor([layer.x, layer.x[:1]], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"x must not be a nested tensor; pass its values\(\)"):
        linear(nested, None, None, layer.basis, layer.lam, layer.gam)
