"""A hundred and fifty steps of soak.py (ten thousand by hand), and every operator 700 times."""

import pytest
import soak
import torch

from randlora_ext import TernaryBasis
from randlora_ext.ops.ternary import operands

pytestmark = pytest.mark.usefixtures("one_thread")


def test_memory_does_not_grow():
    torch.manual_seed(0)
    before, after = soak.soak(150)
    # Of the whole process, which other tests have filled: resident memory says nothing here.
    assert soak.grown(before | {"resident": 0}, after | {"resident": 0}) == [], (before, after)


OPERATORS = sorted(
    {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
     if name.startswith("randlora::")}
)  # fmt: skip


def call_of(name):
    """A call of the operator; its result is dropped."""
    ops = torch.ops.randlora
    basis, hadamard = TernaryBasis(11, 70, 3, 1 / 3), TernaryBasis(11, 70, 3, kind="hadamard")
    bases = operands(basis, "cpu", 0.5)
    values = bases._asdict() | {
        "x": torch.randn(2, 11), "dy": torch.randn(2, 70), "weight": torch.randn(70, 11),
        "bias": None, "lam": torch.randn(basis.r, basis.n), "gam": torch.randn(basis.n, basis.d),
        "grad": torch.randn(70, 11), "delta": torch.randn(70, 11), "path": "factored",
        "b_dense": None, "need_x": True, "need_diagonals": True, "rounding_seed": 7,
        "first_row": 0, "first_column": 0, "merge": False, "planes": bases.packed[3],
        "cols": basis.K, "by_column": True, "wide": False, "value": 0.5, "dtype": torch.half,
        "seed": 1, "role": 1, "row_start": 0, "col_start": 0, "threshold": 5, "d": basis.d,
    }  # fmt: skip
    values |= dict(zip(("a_offset", "a_index"), bases.packed[:2], strict=True))
    values |= dict(zip(("s", "row", "col"), hadamard.packed("cpu"), strict=True))
    values |= dict(zip(("A", "B"), basis.dense(), strict=True)) | {"dense": basis.dense()[1]}
    lists = ops.planes_to_lists(bases.packed[3].clone(), basis.K, False, False)
    values |= dict(zip(("offset", "index"), lists, strict=True))
    op = getattr(ops, name)
    names = [argument.name for argument in op.default._schema.arguments]
    if "rounding_seed" in names:
        values["weight"] = values["weight"].half()
    if name == "scaled_basis_backward":
        values["grad"] = torch.ones(basis.K, basis.d)
    if name == "fill_planes_":
        values["planes"] = values["planes"].clone()
    return lambda: op(*(values[n] for n in names))


@pytest.mark.parametrize("name", OPERATORS)
def test_no_call_keeps_memory(name):
    call = call_of(name)

    for calls in (100, 600):
        before = soak.allocated()
        for _ in range(calls):
            call()
    # Of the smallest block that malloc hands out, 32 bytes, not one in four of the 600 calls.
    assert soak.allocated() - before < 8 * 600
