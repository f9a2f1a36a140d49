"""Basis specifications 1 and hadamard-1: vectors, NumPy reference and compiled code agree bit for
bit."""

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from basis_reference import hadamard, philox4x32_10, signs, ternary, threshold
from basis_vectors import (
    HADAMARD_FILE,
    VECTOR_FILE,
    from_planes,
    planes_digest,
    read_vectors,
    to_lists,
    to_planes,
    to_signs,
)

from randlora_ext import _C, Basis
from randlora_ext.basis.description import as_signed
from randlora_ext.basis.hadamard import signs as compiled_signs

VECTORS, HADAMARD_VECTORS = read_vectors(VECTOR_FILE), read_vectors(HADAMARD_FILE)
LIMIT = 2**32


def fill(seed, role, row, col, rows, cols, density):
    """The slice from the compiled op; the planes start full, so that every bit must be written."""
    planes = torch.full((2, rows, -(-cols // 64)), -1, dtype=torch.int64)
    torch.ops.randlora.fill_planes_(
        planes, as_signed(seed), role, row, col, cols, threshold(density)
    )
    return planes.numpy()


def values(seed, role, row, col, rows, cols, density):
    """The slice from the NumPy reference."""
    at = (np.arange(start, start + n, dtype=np.uint64) for start, n in ((row, rows), (col, cols)))
    return ternary(seed, role, *np.ix_(*at), density)


def place_of(fields):
    """Seed to density of a record."""
    return (*map(int, fields[:-1]), float(fields[-1]))


def test_what_is_published_never_changes():
    files = {
        VECTOR_FILE: "6896195c385a9299a07e707a9c25c3c2fcc5e4ce7b7a462adc4aff9c02da1a5c",
        HADAMARD_FILE: "e88ecf169ccb5de2068edc252b1862a0575b246e8e028f6ee6a528ce70007c3b",
    }
    for file, digest in files.items():
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digest


def test_philox_vectors():
    for record in VECTORS["philox"]:
        words = tuple(int(word, 16) for word in record)
        counter, key, output = words[:4], words[4:6], words[6:]
        assert tuple(philox4x32_10(counter, key).tolist()) == output
        assert tuple(_C.philox4x32_10(counter, key)) == output


def test_threshold_vectors():
    for density, expected in VECTORS["threshold"]:
        assert threshold(float(density)) == _C.threshold(float(density)) == int(expected)


def test_threshold_is_exact_rounding():
    # Rounding half up of the exact product; the fp64 formula never rounds a second time.
    drawn = np.random.default_rng(1).random(2000)
    near_half = [(k + 0.5) * 2.0**-31 for k in (0, 1, 2, 3, 2**20 - 1, 2**30 - 1, 2**30)]
    near = [math.nextafter(x, limit) for x in near_half for limit in (0.0, 1.0)]
    published = [float(density) for density, _ in VECTORS["threshold"]]
    for density in [*published, *drawn, *drawn * 2.0**-31, *near_half, *near]:
        exact = max(1, math.floor(Fraction(float(density)) * 2**31 + Fraction(1, 2)))
        assert threshold(density) == _C.threshold(density) == exact


def test_threshold_refuses():
    for density in (-0.0, -0.5, math.nextafter(1.0, 2.0), math.inf, -math.inf, math.nan):
        assert _C.threshold(density) == 0  # never a threshold


@pytest.mark.parametrize("record", VECTORS["elements"], ids=lambda r: " ".join(r[:6]))
def test_element_vectors(record):
    seed, role, row, col, count, density = place_of(record[:6])
    place = seed, role, row, col, 1, count, density
    single = [_C.element(seed, role, row, c, threshold(density)) for c in range(col, col + count)]
    for way in (values(*place)[0], from_planes(fill(*place), count)[0], np.array(single)):
        assert to_signs(way) == record[6]


SLICES = [(*r[:7], *n[7:], r[7]) for r, n in zip(VECTORS["planes"], VECTORS["counts"], strict=True)]


@pytest.mark.parametrize("record", SLICES, ids=lambda r: " ".join(r[:7]))
def test_slice_vectors(record):
    place, (*counts, digest) = place_of(record[:7]), record[7:]
    assert planes_digest(to_planes(values(*place))) == digest
    for threads in (1, 2):
        torch.set_num_threads(threads)
        planes = fill(*place)
        assert planes_digest(planes) == digest
    bits = np.unpackbits(planes.view(np.uint8), axis=-1).sum(axis=(1, 2))
    assert bits.tolist() == list(map(int, counts))


def test_list_vectors():
    for record in VECTORS["lists"]:
        place, (by, *expected) = place_of(record[:7]), record[7:]
        offset, index = to_lists(values(*place), by == "column")
        assert [",".join(map(str, part)) for part in (offset, index)] == expected
        planes = torch.from_numpy(fill(*place))
        got = torch.ops.randlora.planes_to_lists(planes, place[5], by == "column")
        assert [part.dtype for part in got] == [torch.int64, torch.int16]
        assert [",".join(map(str, part.tolist())) for part in got] == expected


@pytest.mark.parametrize(
    "argument, value",
    [
        *(("role", value) for value in (2, 6, -1)),  # 2 is reserved
        *(("row_start", value) for value in (-1, LIMIT - 1, 2**63 - 1)),
        *(("col_start", value) for value in (-1, LIMIT - 69, 2**63 - 1)),
        *(("cols", value) for value in (64, 129, -1)),
        *(("threshold", value) for value in (0, 2**31 + 1)),
        ("planes", torch.zeros(2, 2, 2, dtype=torch.int32)),
        *(("planes", torch.zeros(shape, dtype=torch.int64)) for shape in ((3, 2, 2), (2, 2))),
    ],
)
def test_fill_planes_refuses_and_names_the_argument(argument, value):
    place = {"seed": 0, "role": 0, "row_start": 0, "col_start": 0, "cols": 70, "threshold": 5}
    arguments = {"planes": torch.zeros(2, 2, 2, dtype=torch.int64)} | place | {argument: value}
    with pytest.raises((RuntimeError, ValueError), match=argument):
        torch.ops.randlora.fill_planes_(**arguments)
    assert not arguments["planes"].any()  # nothing is changed


# ---- hadamard-1


def compiled(in_features, out_features, r, seed):
    basis = Basis(in_features, out_features, r, seed=seed, kind="hadamard")
    return [matrix.to(torch.int8).numpy() for matrix in basis.dense(dtype=torch.float64)]


def test_sign_vectors():
    for record in HADAMARD_VECTORS["signs"]:
        seed, role, first, count = map(int, record[:4])
        planes = fill(seed, role, 0, first, 1, count, 1.0)
        places = range(first, first + count)
        single = [_C.element(seed, role, 0, e, threshold(1.0)) for e in places]
        ways = [signs(seed, role, first, count), from_planes(planes, count)[0], np.array(single)]
        if first < 2**31:
            drawn = compiled_signs(seed, role, first + count, torch.device("cpu"))[first:]
            ways.append(drawn.to(torch.int8).numpy())
        for way in ways:
            assert to_signs(way) == record[4]


@pytest.mark.parametrize("source", [hadamard, compiled])
def test_matrix_vectors(source):
    for *layer, name, digest in HADAMARD_VECTORS["matrix_planes"]:
        matrix = source(*map(int, layer))["AB".index(name)]
        assert planes_digest(to_planes(matrix)) == digest, (layer, name)
    for *layer, name, row, expected in HADAMARD_VECTORS["matrix_row"]:
        assert to_signs(source(*map(int, layer))["AB".index(name)][int(row)]) == expected


def test_the_packed_form_holds_the_signs_and_nothing_else():
    basis = Basis(61, 130, 7, seed=2**64 - 1, kind="hadamard")
    for role, (packed, count) in enumerate(zip(basis.packed(), (61, 130, 63), strict=True), 3):
        assert packed.shape == (count,)
        assert np.array_equal(packed.numpy(), signs(2**64 - 1, role, 0, count))
    assert (basis.kind, basis.format, basis.density, basis.scale) == ("hadamard",) * 2 + (1.0, 1.0)
