"""`Basis` as a description: sizes, values, equality, copies, import, bad arguments."""

import copy
import math
import pickle
import re

import numpy as np
import pytest
import torch
from basis_reference import ternary
from layer_cases import imported_basis

from randlora_ext import Basis, delta_weight, linear
from randlora_ext.basis import BasisDescription
from randlora_ext.basis.ternary import pack_dense


def test_sizes():
    for sizes in ((50, 37), (37, 50)):
        basis = Basis(*sizes, 7, 0.07, seed=9)
        assert (basis.in_features, basis.out_features, basis.r) == (*sizes, 7)
        assert (basis.d, basis.D, basis.n, basis.K) == (37, 50, 6, 42)
        assert (basis.density, basis.seed) == (0.07, 9)
    assert Basis(1, 1, 2**16, 0.5).K == 2**16  # the largest r


@pytest.mark.parametrize(
    "density, dtype",
    [(1.0, torch.float64), (1 / 3, torch.float32), (0.07, torch.bfloat16), (1 / 64, torch.float16)],
)
def test_dense_is_the_specification_times_its_scale(density, dtype):
    basis = Basis(70, 37, 7, density, seed=2**64 - 1)
    A, B = basis.dense(dtype=dtype)
    assert A.shape == (7, 37) and B.shape == (70, 42) and A.dtype == B.dtype == dtype
    value = torch.tensor(1 / math.sqrt(density), dtype=torch.float64).to(dtype)
    for role, matrix in enumerate((A, B)):
        rows, cols = np.arange(matrix.shape[0])[:, None], np.arange(matrix.shape[1])
        signs = torch.from_numpy(ternary(2**64 - 1, role, rows, cols, density))
        assert torch.equal(matrix, signs.to(dtype) * value)
    assert basis.scale == pytest.approx(1 / density, rel=1e-15)


# ---- equality, hash, copies


def test_equality_and_hash_are_those_of_the_description():
    arguments = (50, 37, 7, 0.07, 9)
    basis, same = Basis(*arguments), Basis(*arguments)
    others = {
        Basis(*arguments[:at], arguments[at] * 1.5 if at == 3 else 8, *arguments[at + 1 :])
        for at in range(5)
    }
    assert basis == same and hash(basis) == hash(same) and len(others) == 5
    assert basis not in others and basis != "a basis"
    assert repr(basis).startswith("Basis(50, 37, r=7, density=0.07, seed=9, kind='indep")


def test_a_copy_is_equal_and_shares_the_packed_tensors():
    basis = Basis(500, 370, 7, 0.07, seed=2**64 - 1)
    imported = imported_basis(*basis.dense(), 500, 370)
    assert len(pickle.dumps(basis)) < 1000 < sum(t.nbytes for t in basis.packed())
    for one, other in (
        (basis, copy.copy(basis)),
        (basis, copy.deepcopy(basis)),
        (basis, pickle.loads(pickle.dumps(basis))),
        (imported, copy.deepcopy(imported)),  # a model of many layers is copied with one basis
    ):
        assert other == one and hash(other) == hash(one) and repr(other) == repr(one)
        packed = ([t.data_ptr() for t in each.packed("cpu")] for each in (one, other))
        assert next(packed) == next(packed)


# ---- import


def test_a_basis_of_zeros():
    A, B = torch.zeros(3, 10), torch.zeros(12, 12)
    for a, b in ((A, B), (A, torch.ones(12, 12)), (torch.ones(3, 10), B)):
        basis = imported_basis(a, b, 12, 10)
        assert all(map(torch.equal, basis.dense(), (a, b)))
        lam, gam = torch.randn(3, 4).requires_grad_(), torch.randn(4, 10).requires_grad_()
        assert not delta_weight(basis, lam, gam).any()
        y = linear(torch.randn(5, 12), None, None, basis, lam, gam)
        assert y.shape == (5, 10) and not y.any()
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), (lam, gam)))


def test_imported_bases_are_equal_by_identity():
    A, B = Basis(50, 37, 7, 0.3).dense()
    first, second = (imported_basis(A, B, 50, 37) for _ in range(2))
    assert first == copy.copy(first) and first != second != Basis(50, 37, 7, 0.3)
    assert all(map(torch.equal, pickle.loads(pickle.dumps(first)).dense(), first.dense()))


# ---- errors

GOOD = {"in_features": 50, "out_features": 37, "r": 7, "density": 0.07, "seed": 0}


@pytest.mark.parametrize(
    "argument, value, error",
    [
        *((name, value, ValueError) for name in [*GOOD][:3] for value in (0, -3)),
        *((name, 2.0, TypeError) for name in GOOD if name != "density"),
        *((name, value, TypeError) for name in GOOD for value in ("7", True)),
        *((name, None, TypeError) for name in GOOD if name != "density"),
        *(("density", value, ValueError) for value in (0, -0.1, 1.5, math.nan, math.inf)),
        *(("seed", value, ValueError) for value in (-1, 2**64)),
        *(("r", value, ValueError) for value in (2**16 + 1, 2**62 + 1)),
    ],
)
def test_bad_arguments(argument, value, error):
    with pytest.raises(error) as raised:
        Basis(**{**GOOD, argument: value})
    message = str(raised.value)
    assert message.startswith(argument) and str(value) in message
    allowed = {"density": "(0, 1]", "seed": "[0, 2**64)", "r": "[1, 65536]"}
    assert allowed.get(argument, "[1, 2**63)") in message


@pytest.mark.parametrize("which, place", [("A", (6, 36)), ("B", (49, 41))])
def test_one_wrong_element_is_found_and_located(which, place):
    for value in (0.1, math.nan, -math.inf):
        A, B = Basis(50, 37, 7, 0.3).dense()
        matrix = A if which == "A" else B
        matrix[place] = value
        assert pack_dense(matrix) is None
        with pytest.raises(RuntimeError, match=re.escape(f"element {place}")):
            torch.ops.randlora.pack_dense(matrix)


def test_a_basis_without_a_non_zero_warns():
    with pytest.warns(UserWarning, match=r"no non-zero element in [AB].*cannot learn"):
        Basis(64, 64, 8, 1e-9, seed=12).packed()
    # A of ones and B of zeros: of lists, and of planes, which a layer of this width has.
    for in_features in (64, 65537):
        zeros = torch.zeros(in_features, 1)
        with pytest.warns(UserWarning, match="no non-zero element in B"):
            imported_basis(torch.ones(1, 1), zeros, in_features, 1).packed()


# ---- the text in saved files


def test_the_key_holds_all_that_decides_a_basis():
    for density in (0.07, 1 / 3, 1, 2.0**-31, 1e-9, 0.123456789):
        for seed in (0, 42, 2**64 - 1):
            description = Basis(8, 8, 2, density, seed).description
            text = f"randlora_ext:independent-1:density={float(density)!r}:seed={seed}"
            assert description.key() == text and BasisDescription.parse(text) == description
    description = Basis(5, 7, 3, seed=42).description
    assert description.key() == "randlora_ext:hadamard-1:seed=42"
    assert BasisDescription.parse(description.key()) == description


def test_a_basis_of_a_description_is_that_of_its_parts():
    for basis in (Basis(5, 7, 3, seed=42), Basis(5, 7, 3, 0.3, seed=2)):
        described = Basis.described(basis.description, 5, 7, 3)
        assert described == basis and described.description is basis.description


@pytest.mark.parametrize(
    "part, others",
    [
        ("0.25", ("0.250", ".25", "25e-2", "+0.25", " 0.25", "0.2_5", "1/4", "0,25", "x", "")),
        ("0.25", ("nan", "inf", "0.0", "1", "2.0", "-0.25")),
        ("=7", ("=07", "=+7", "=-7", "= 7", "=7 ", "=\u0667", "=" + "7" * 5000, "=7\n", "=")),
        ("=7", (f"={2**64}",)),
        ("independent-1", ("lattice-1", "independent-2", "independent-01", "independent-\u0661")),
        ("independent-1", ("INDEPENDENT-1", "hadamard-1", "hadamard-2")),
        ("randlora_ext", ("peft", " randlora_ext")),
    ],
)
def test_what_key_does_not_write(part, others):
    text = BasisDescription("independent", 0.25, 7).key()
    for other in (*(text.replace(part, other) for other in others), "", 3):
        with pytest.raises(ValueError, match="is no key of a basis|of basis specification"):
            BasisDescription.parse(other)


@pytest.mark.parametrize("name, at", [("A", 0), ("B", 1)])
@pytest.mark.parametrize(
    "value, error, told",
    [
        (None, TypeError, "must be a tensor of real numbers, got None"),
        ([[1.0]], TypeError, r"must be a tensor of real numbers, got \[\[1.0\]\]"),
        (
            torch.ones(4, 40, dtype=torch.cfloat),
            TypeError,
            "must be a tensor of real .*complex64",
        ),
        (torch.ones(40), ValueError, r"must be a matrix, got \(40,\)"),
        (torch.ones(2, 4, 40), ValueError, r"must be a matrix, got \(2, 4, 40\)"),
        (torch.ones(0, 40), ValueError, r"must be a matrix, got \(0, 40\)"),
    ],
)
def test_given_matrices_that_are_none(name, at, value, error, told):
    matrices = [torch.ones(4, 40), torch.ones(60, 40)]
    matrices[at] = value
    with pytest.raises(error, match=rf"^{name} {told}"):
        Basis.from_dense(*matrices, 40, 60)
