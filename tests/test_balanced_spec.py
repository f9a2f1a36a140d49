"""Basis specification, version 2: vectors, NumPy reference and compiled code agree bit for bit."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from balanced_reference import ROLE_A, ROLE_B, lines, matrices, philox, signs, support
from basis_vectors import planes_digest, to_planes
from make_balanced_vectors import PACKED, VECTOR_FILE, render, to_packed

from randlora_ext import TernaryBasis

ops = torch.ops.randlora
LIMIT = 2**32
# seed, role, line, lines, r, q, n: odd on purpose (words of signs that are full, nearly empty, one
# over; one group; all of them; the ends of the index range).
ODD = [
    (0, 1, 0, 1, 1, 1, 1),
    (1, 1, 5, 64, 8, 2, 31),
    (2**32, 1, 9, 65, 8, 3, 32),
    (2**63, 1, 100, 77, 5, 5, 33),
    (2**64 - 1, 1, LIMIT - 3, 3, 16, 4, 129),
    (7, 0, 0, 200, 9, 4, 1),
    (7, 0, LIMIT - 130, 130, 4, 1, 1),
]


def read_vectors() -> dict[str, list[list[str]]]:
    records = defaultdict(list)
    for line in VECTOR_FILE.read_text(encoding="ascii").splitlines():
        if line and not line.startswith("#"):
            keyword, *fields = line.split()
            records[keyword].append(fields)
    return dict(records)


VECTORS = read_vectors()


def fill(seed, role, line, count, r, q, n, wide=False):
    """Packed lines from the compiled op, whose tensors start full: every entry must be written."""
    offset = torch.full((r + 1,), -1)
    row = torch.full((count * q,), -1, dtype=torch.int32 if wide else torch.int16)
    sign = torch.full((count * q, -(-n // 32)), -1, dtype=torch.int32)
    signed = seed - 2**64 if seed >= 2**63 else seed
    ops.fill_balanced_(offset, row, sign, signed, role, line, q, n)
    return offset, row, sign


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_vector_file_regenerates_byte_for_byte():
    assert VECTOR_FILE.read_bytes() == render().encode("ascii")


def test_vector_file_has_every_kind_of_record():
    assert sorted(VECTORS) == ["packed", "planes", "signs", "support"]


@pytest.mark.parametrize("record", VECTORS["support"], ids=" ".join)
def test_support_vectors(record):
    *place, expected = record
    seed, role, line, r, q = map(int, place)
    offset, _, _ = fill(seed, role, line, 1, r, q, 1, wide=True)
    chosen = offset.diff().nonzero().flatten().tolist()
    assert ",".join(map(str, chosen)) == expected


@pytest.mark.parametrize("record", VECTORS["packed"], ids=lambda r: " ".join(r[:7]))
def test_packed_vectors(record, threads):
    place = tuple(map(int, record[:7]))
    offset, row, sign = fill(*place)
    text = [",".join(map(str, part.tolist())) for part in (offset, row)]
    text.append(",".join(f"{word & 0xFFFFFFFF:08x}" for word in sign.flatten().tolist()))
    assert place in PACKED and text == record[7:]


@pytest.mark.parametrize("record", VECTORS["planes"], ids=lambda r: " ".join(r[:7]))
def test_planes_vectors(record, threads):
    place = tuple(map(int, record[:7]))
    planes = ops.balanced_to_planes(*fill(*place), place[3], place[6])
    assert planes_digest(planes.numpy()) == record[7]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("place", ODD, ids=str)
def test_compiled_equals_reference(place, wide, threads):
    values = lines(*place)
    offset, row, sign = fill(*place, wide=wide)
    for got, want in zip((offset, row, sign), to_packed(values, place[4]), strict=True):
        assert np.array_equal(got.numpy().astype(np.int64) & 0xFFFFFFFF, want)
    planes = ops.balanced_to_planes(offset, row, sign, place[3], place[6])
    assert np.array_equal(planes.numpy(), to_planes(values))


def test_support_is_the_q_smallest_keys():
    # The layout of the text, spelled out.
    seed, line, r = 0xFEDCBA9876543210, 12345, 11
    keys = [int(philox(seed, j // 4, line, 1, 2)[j % 4]) for j in range(r)]
    for q in (1, 4, r):
        assert support(seed, 1, line, r, q).tolist() == sorted(
            sorted(range(r), key=keys.__getitem__)[:q]
        )


def test_signs_are_bits_of_the_right_word():
    seed, line, j = 3, 77, 5
    for i in (0, 1, 31, 32, 100, 127, 128, 1000, LIMIT - 1):
        word = int(philox(seed, i // 128, line, 2 * j + 3, 2)[i % 128 // 32])
        assert signs(seed, 1, line, j, 1, i)[0] == (-1 if word >> i % 32 & 1 else 1)


def test_lines_depend_on_nothing_else():
    seed, r, q = 99, 12, 3
    whole = lines(seed, ROLE_B, 0, 60, r, q, 70)
    for first, count, n in ((0, 60, 1), (13, 20, 33), (59, 1, 70)):
        planes = ops.balanced_to_planes(*fill(seed, 1, first, count, r, q, n), count, n)
        part = whole[first : first + count, : r * n]
        assert np.array_equal(planes.numpy(), to_planes(part))


def test_smaller_q_is_a_part_of_the_larger_with_its_signs():
    few, many = lines(4, ROLE_B, 0, 50, 16, 2, 40), lines(4, ROLE_B, 0, 50, 16, 5, 40)
    assert np.array_equal(few, np.where(few != 0, many, 0))


@pytest.mark.parametrize("sizes", [(40, 72), (72, 40), (33, 33)])
def test_basis_is_the_reference(sizes):
    basis = TernaryBasis(*sizes, 6, 1 / 3, seed=2**64 - 5, support="balanced")
    A, B = matrices(basis.seed, basis.d, basis.D, 6, 2, basis.n)
    got_a, got_b = basis.dense(dtype=torch.float64)
    scale = 1 / np.sqrt(basis.density)
    assert np.array_equal(got_a.numpy(), A * scale) and np.array_equal(got_b.numpy(), B * scale)
    assert torch.equal(got_a, basis.dense_a("cpu", torch.float64))
    assert np.array_equal(basis.dense_b("cpu", torch.float64).numpy(), B)


@pytest.mark.parametrize(
    "argument, change",
    [
        ("role", {"role": 2}),
        ("line_start", {"line_start": -1}),
        ("line_start", {"line_start": LIMIT - 2}),
        ("line_start", {"line_start": 2**63 - 1}),
        ("q", {"q": 0}),
        ("q", {"q": 6}),
        ("row", {"row": torch.zeros(7, dtype=torch.int16)}),
        ("row", {"row": torch.zeros(6)}),
        ("row", {"row": torch.zeros(65538 * 2, dtype=torch.int16)}),
        ("offset", {"offset": torch.zeros(6, dtype=torch.int32)}),
        ("offset", {"offset": torch.zeros(1, dtype=torch.int64)}),
        ("sign", {"sign": torch.zeros(6, 1, dtype=torch.int32)}),
        ("sign", {"sign": torch.zeros(6, 2, dtype=torch.int64)}),
        ("n must", {"n": 0}),
    ],
)
def test_fill_refuses_and_names_the_argument(argument, change):
    good = {
        "offset": torch.zeros(6, dtype=torch.int64), "row": torch.zeros(6, dtype=torch.int16),
        "sign": torch.zeros(6, 2, dtype=torch.int32), "seed": 0, "role": 0, "line_start": 0, "q": 2,
        "n": 40,
    }  # fmt: skip
    arguments = {**good, **change}
    with pytest.raises(RuntimeError, match=f"randlora: {argument}"):
        ops.fill_balanced_(**arguments)
    assert not any(arguments[name].any() for name in ("offset", "row", "sign"))


def test_to_planes_refuses_lines_that_are_not_there():
    packed = fill(0, ROLE_A, 0, 9, 4, 2, 1)
    with pytest.raises(RuntimeError, match="ascend below 8"):
        ops.balanced_to_planes(*packed, 8, 1)
    offset, row, sign = packed
    with pytest.raises(RuntimeError, match="offset"):
        ops.balanced_to_planes(offset + 1, row, sign, 9, 1)
    with pytest.raises(RuntimeError, match="sign"):
        ops.balanced_to_planes(offset, row, sign, 9, 33)
    with pytest.raises(RuntimeError, match="row"):
        ops.balanced_to_planes(offset, row.flip(0), sign, 9, 1)
