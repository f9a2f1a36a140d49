"""`TernaryBasis` as a description: sizes, values, equality, copies, import, bad arguments."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from basis_reference import ternary
from torch.nn.functional import pad

from randlora_ext import TernaryBasis, delta_weight, linear
from randlora_ext.basis import BasisDescription

DENSITIES = [1.0, 1 / 3, 0.07, 1 / 64]


def test_sizes():
    basis = TernaryBasis(50, 37, 7, 0.07, seed=9)
    assert (basis.in_features, basis.out_features, basis.r) == (50, 37, 7)
    assert (basis.d, basis.D, basis.n, basis.K) == (37, 50, 6, 42)
    assert (basis.density, basis.seed) == (0.07, 9)
    turned = TernaryBasis(37, 50, 7, 0.07, seed=9)
    assert (turned.d, turned.D, turned.n, turned.K) == (37, 50, 6, 42)
    assert TernaryBasis(3, 5, 8, 1).n == 1  # r > d: one base
    assert TernaryBasis(1, 1, 2**16, 0.5).K == 2**16  # the largest r


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dense_is_the_specification_times_its_scale(density, dtype):
    basis = TernaryBasis(70, 37, 7, density, seed=2**64 - 1)
    A, B = basis.dense(dtype=dtype)
    assert A.shape == (7, 37) and B.shape == (70, 42) and A.dtype == B.dtype == dtype
    value = torch.tensor(1 / math.sqrt(density), dtype=torch.float64).to(dtype)
    for role, matrix in enumerate((A, B)):
        rows, cols = np.arange(matrix.shape[0])[:, None], np.arange(matrix.shape[1])
        signs = torch.from_numpy(ternary(2**64 - 1, role, rows, cols, density))
        assert torch.equal(matrix, signs.to(dtype) * value)
    assert torch.equal(basis.dense_a("cpu", dtype), A)
    assert basis.scale == pytest.approx(1 / density, rel=1e-15)


# ---- equality, hash, copies


def test_equality_and_hash_are_those_of_the_description():
    basis = TernaryBasis(50, 37, 7, 0.07, seed=9)
    same = TernaryBasis(50, 37, 7, 0.07, seed=9)
    others = [
        TernaryBasis(*sizes)
        for sizes in ((37, 50, 7, 0.07, 9), (50, 36, 7, 0.07, 9), (50, 37, 6, 0.07, 9),
                      (50, 37, 7, 0.08, 9), (50, 37, 7, 0.07, 8))
    ]  # fmt: skip
    assert basis == same and hash(basis) == hash(same) and len({basis, same, *others}) == 6
    assert all(basis != other for other in others)
    assert basis != "a basis" and (basis == 1) is False


def test_a_copy_is_equal_and_shares_the_packed_tensors():
    basis = TernaryBasis(500, 370, 7, 0.07, seed=2**64 - 1)
    imported = TernaryBasis.from_ternary(*basis.dense(), 500, 370)
    assert len(pickle.dumps(basis)) < 1000 < basis.packed_bytes("cpu")
    for one, other in (
        (basis, copy.copy(basis)),
        (basis, copy.deepcopy(basis)),
        (basis, pickle.loads(pickle.dumps(basis))),
        (imported, copy.deepcopy(imported)),  # a model of many layers is copied with one basis
    ):
        assert other == one and hash(other) == hash(one) and repr(other) == repr(one)
        packed = ([t.data_ptr() for t in each.packed("cpu")] for each in (one, other))
        assert next(packed) == next(packed)


def test_repr():
    text = repr(TernaryBasis(50, 37, 7, 1 / 3, seed=9))
    start = "TernaryBasis(50, 37, r=7, density=0.333333, seed=9, kind='independent', "
    assert text == start + "format='planes')"
    imported = TernaryBasis.from_ternary(torch.eye(2, 4), torch.ones(4, 4), 4, 4)
    assert "imported" in repr(imported) and "seed" not in repr(imported)


# ---- import


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_import_of_peft_is_exact(density, dtype):
    # A (r, 1, >= d) and B (>= D, >= n, r), as PEFT shares them over layers.
    generated = TernaryBasis(50, 37, 7, density, seed=1)
    A, B = generated.dense(dtype=dtype)
    rest = {"value": torch.nan}
    shared = pad(A[:, None], (0, 5), **rest), pad(B.view(50, 6, 7), (0, 0, 0, 5, 0, 5), **rest)
    imported = TernaryBasis.from_ternary(*shared, 50, 37)
    assert all(map(torch.equal, imported.dense(dtype=dtype), (A, B)))
    value = float(torch.tensor(1 / math.sqrt(density), dtype=torch.float64).to(dtype))
    assert imported.scale == value * value
    assert (imported.r, imported.n, imported.seed) == (generated.r, generated.n, None)
    assert imported.density == pytest.approx((B != 0).double().mean().item(), rel=1e-12)


def test_import_takes_any_magnitudes_parameters_and_views_and_keeps_its_own_copy():
    A, B = TernaryBasis(50, 37, 7, 0.3).dense(dtype=torch.float64)
    left, right = torch.nn.Parameter(A.sign() * 0.1), (B.sign() * 7).T.contiguous().T
    imported = TernaryBasis.from_ternary(left, right.requires_grad_(), 50, 37)
    with torch.no_grad():
        left.zero_()
    assert imported.scale == 0.1 * 7.0
    for _ in range(2):  # fresh every time
        a, b = imported.dense(dtype=torch.float64)
        assert torch.equal(a, A.sign() * 0.1) and torch.equal(b, B.sign() * 7.0)
        assert not a.requires_grad
        a.fill_(9)


def test_a_basis_of_zeros():
    A, B = torch.zeros(3, 10), torch.zeros(12, 12)
    for a, b in ((A, B), (A, torch.ones(12, 12)), (torch.ones(3, 10), B)):
        basis = TernaryBasis.from_ternary(a, b, 12, 10)
        assert torch.equal(basis.dense()[0], a) and torch.equal(basis.dense()[1], b)
        lam, gam = torch.randn(3, 4).requires_grad_(), torch.randn(4, 10).requires_grad_()
        assert not delta_weight(basis, lam, gam).any()
        y = linear(torch.randn(5, 12), None, None, basis, lam, gam)
        assert y.shape == (5, 10) and not y.any()
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), (lam, gam)))


def test_imported_bases_are_equal_by_identity():
    A, B = TernaryBasis(50, 37, 7, 0.3).dense()
    first, second = (TernaryBasis.from_ternary(A, B, 50, 37) for _ in range(2))
    assert first == first and first == copy.copy(first) and first != second
    assert first != TernaryBasis(50, 37, 7, 0.3)
    loaded = pickle.loads(pickle.dumps(first))
    assert all(torch.equal(a, b) for a, b in zip(loaded.dense(), first.dense(), strict=True))


# ---- errors

GOOD = {"in_features": 50, "out_features": 37, "r": 7, "density": 0.07, "seed": 0}


@pytest.mark.parametrize(
    "argument, value, error",
    [
        *((name, 0, ValueError) for name in ("in_features", "out_features", "r")),
        *((name, -3, ValueError) for name in ("in_features", "out_features", "r")),
        *((name, 2.0, TypeError) for name in ("in_features", "out_features", "r", "seed")),
        *((name, "7", TypeError) for name in GOOD),
        *((name, True, TypeError) for name in GOOD),
        *((name, None, TypeError) for name in GOOD if name != "density"),
        *(("density", value, ValueError) for value in (0, -0.1, 1.5, math.nan, math.inf)),
        *(("seed", value, ValueError) for value in (-1, 2**64)),
        *(("r", value, ValueError) for value in (2**16 + 1, 2**31 - 1, 2**62 + 1)),
    ],
)
def test_bad_arguments(argument, value, error):
    with pytest.raises(error) as raised:
        TernaryBasis(**{**GOOD, argument: value})
    message = str(raised.value)
    assert message.startswith(argument) and str(value) in message
    allowed = {"density": "(0, 1]", "seed": "[0, 2**64)"}.get(argument, "positive integer")
    assert ("at most 65536" if value in (2**16 + 1, 2**31 - 1, 2**62 + 1) else allowed) in message


def dense_pair():
    A, B = TernaryBasis(50, 37, 7, 0.3).dense()
    return {"A": A, "B": B, "in_features": 50, "out_features": 37}


@pytest.mark.parametrize(
    "name, value",
    [
        *(("A", torch.full((7, 37), value)) for value in (torch.nan, torch.inf)),
        *(("A", torch.ones(size)) for size in ((7, 36), (37,), (7, 2, 37), (0, 37))),
        *(("B", torch.ones(size)) for size in ((49, 42), (50, 41))),
        *(("B", torch.ones(size)) for size in ((49, 6, 7), (50, 5, 7), (50, 6, 8))),
        *(("B", torch.randn(size)) for size in ((50, 42), (50, 6, 7))),
        ("A", torch.ones(7, 37, dtype=torch.int64)),
        ("B", torch.ones(50, 42, dtype=torch.bool)),
        ("in_features", 0),
        ("out_features", -37),
    ],
)
def test_bad_dense_bases(name, value):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        TernaryBasis.from_ternary(**(dense_pair() | {name: value}))


@pytest.mark.parametrize("which, place", [("A", (6, 36)), ("B", (49, 41))])
def test_one_wrong_element_is_found_and_located(which, place):
    for value in (0.1, math.nan, -math.inf):
        pair = dense_pair()
        pair[which][place] = value
        with pytest.raises(ValueError, match=which) as raised:
            TernaryBasis.from_ternary(**pair)
        assert str(place) in str(raised.value)


def test_an_element_of_planes_has_one_sign():
    A, B = TernaryBasis(50, 37, 7, 0.3, seed=3).dense()
    a, b = (torch.ops.randlora.pack_dense(matrix)[0] for matrix in (A, B))
    signs = TernaryBasis.from_planes(a, b, 2.0, 3.0, 50, 37).dense()
    assert torch.equal(signs[0], A.sign() * 2) and torch.equal(signs[1], B.sign() * 3)
    for name, bad in (("a_planes", (a | 1, b)), ("b_planes", (a, b | 1))):
        with pytest.raises(ValueError, match=rf"{name} has elements that are \+1 and -1 at once"):
            TernaryBasis.from_planes(*bad, 1.0, 1.0, 50, 37)
    for bad in (b.int(), b[:1]):
        with pytest.raises(ValueError, match="b_planes must be"):
            TernaryBasis.from_planes(a, bad, 1.0, 1.0, 50, 37)
    with pytest.raises(ValueError, match=r"a_planes must be \(2, r, words\), got \(3,\)"):
        TernaryBasis.from_planes(a[0, 0, :1].expand(3), b, 1.0, 1.0, 50, 37)


def test_a_basis_without_a_non_zero_warns():
    with pytest.warns(UserWarning, match=r"no non-zero element in [AB].*cannot learn"):
        TernaryBasis(64, 64, 8, 1e-9, seed=12).packed()


# ---- the text in saved files


def test_the_key_holds_all_that_decides_a_basis():
    for density in (0.07, 1 / 3, 1, 2.0**-31, 1e-9, 0.123456789):
        for seed in (0, 42, 2**64 - 1):
            description = TernaryBasis(8, 8, 2, density, seed).description
            text = f"randlora_ext:independent-1:density={float(density)!r}:seed={seed}"
            assert description.key() == text and BasisDescription.parse(text) == description


@pytest.mark.parametrize(
    "text, message",
    [
        ("generated-1:3", "no key of a basis"), ("", "no key"), (3, "no key"),
        ("randlora_ext:independent-2:density=0.1:seed=3", "specification independent-2.*knows"),
        ("randlora_ext:independent-1:density=2:seed=3", "density must be in"),
        ("randlora_ext:independent-1:density=nan:seed=3", "density must be in"),
        (f"randlora_ext:independent-1:density=0.1:seed={2**64}", "seed must be"),
    ],
)  # fmt: skip
def test_what_is_no_key(text, message):
    with pytest.raises(ValueError, match=message):
        BasisDescription.parse(text)


@pytest.mark.parametrize(
    "part, others",
    [
        ("0.25", ("0.250", ".25", "25e-2", "+0.25", " 0.25", "0.2_5", "1/4", "0,25", "x", "")),
        ("0.25", ("nan", "inf", "0.0", "1", "2.0", "-0.25")),
        ("=7", ("=07", "=+7", "=-7", "= 7", "=7 ", "=\u0667", "=" + "7" * 5000, "=7\n", "=")),
        ("independent-1", ("lattice-1", "independent-01", "independent-\u0661", "INDEPENDENT-1")),
        ("randlora_ext", ("peft", " randlora_ext")),
    ],
)
def test_what_key_does_not_write(part, others):
    text = BasisDescription("independent", 0.25, 7).key()
    for other in others:
        with pytest.raises(ValueError, match="is no key of a basis|of basis specification"):
            BasisDescription.parse(text.replace(part, other))
