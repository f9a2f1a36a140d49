"""Balanced bases through every operator, against the plain PyTorch reference on dense matrices."""

import copy
import math
import pickle

import pytest
import torch
from layer_cases import SIXTEEN_BITS, assert_rule, exact, make_layer, ours, plain
from test_determinism import restore_threads, same_for_any_threads  # noqa: F401
from test_linear import assert_exact

from randlora_ext import RandLoraLinear, TernaryBasis, apply_randlora, delta_weight, explain, linear
from randlora_ext.reference import delta_weight_reference

ops = torch.ops.randlora
# in, out, r, q: n beside a word of 32 signs, |S_j| beside 32 rows and empty (r > D), q = 1 and r.
SHAPES = [
    (64, 64, 8, 2),
    (48, 80, 8, 1),
    (80, 48, 8, 8),
    (50, 37, 7, 3),
    (37, 50, 7, 2),
    (20, 24, 32, 4),
    (101, 67, 1, 1),
    (67, 101, 2, 1),
    (1, 1, 1, 1),
    (5, 1, 2, 1),
    (33, 130, 16, 5),
    (200, 66, 2, 1),
]
PATHS = ["factored", "delta", "merged"]


def balanced_layer(shape, tokens, dtype=torch.float64):
    *sizes, r, q = shape
    return make_layer(*sizes, r, q / r, tokens, dtype, support="balanced")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("one_thread")
def test_float64(shape):
    for tokens in (0, 1, 3, 16, 33, 100, 257):
        layer = balanced_layer(shape, tokens)
        assert layer.basis.format == "balanced" and len(layer.basis.packed()) == 5
        assert_exact(layer)
        assert_exact(layer.without_weight())


@pytest.mark.parametrize("shape", [(530, 640, 16, 2), (640, 530, 16, 4)], ids=str)
def test_float64_of_many_rows(shape):
    assert_exact(balanced_layer(shape, 33), ["factored", "delta"])


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 8, 2), (50, 37, 7, 3), (37, 130, 16, 4)], ids=str)
@pytest.mark.usefixtures("one_thread")
def test_error_rule(shape, dtype):
    for tokens in (1, 33, 257):
        layer = balanced_layer(shape, tokens, dtype)
        for case in (layer, layer.without_weight()):
            for path in ("factored", "delta"):
                assert_rule(ours(case, path), plain(case), exact(case), dtype)


@pytest.mark.parametrize("shape", [(157, 93, 9, 2), (93, 157, 9, 3), (108, 88, 6, 1)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for tokens in (1, 24, 300):
            layer = balanced_layer(shape, tokens, dtype)
            for path in PATHS:
                same_for_any_threads(lambda layer=layer, path=path: [*ours(layer, path).values()])


@pytest.mark.parametrize("shape", [(157, 93, 9, 2), (93, 157, 9, 3)], ids=str)
def test_a_token_has_the_same_bits_in_any_batch(shape):
    layer = balanced_layer(shape, 100, torch.float32).without_weight()
    whole = ours(layer, "factored")
    for first, last in ((0, 1), (7, 12), (30, 100)):
        part = copy.copy(layer)
        part.x, part.dy = layer.x[first:last], layer.dy[first:last]
        some = ours(part, "factored")
        assert torch.equal(some["y"], whole["y"][first:last])
        assert torch.equal(some["dx"], whole["dx"][first:last])


def test_positions_of_32_bits():
    layer = make_layer(65_600, 3, 3, 1 / 3, 2, support="balanced")
    assert layer.basis.packed()[3].dtype == torch.int32
    assert_exact(layer, ["factored"])


@pytest.mark.parametrize(
    "cut",
    [(72, 200, range(72), range(100, 200)), (200, 72, range(130, 200), range(72)),
     (72, 80, range(24, 48), range(80)), (80, 72, range(80), range(1, 13))],
    ids=str,
)  # fmt: skip
def test_slices(cut):
    n_in, n_out, inputs, outputs = cut
    whole = TernaryBasis(n_in, n_out, 6, 1 / 3, seed=3, support="balanced")
    part = whole.slice(inputs, outputs)
    A, B = whole.dense(dtype=torch.float64)
    rows, columns = (outputs, inputs) if whole.expand else (inputs, outputs)
    own = part.dense(dtype=torch.float64)
    assert torch.equal(own[0], A[:, columns.start : columns.stop])
    assert torch.equal(own[1], B[rows.start : rows.stop])
    lam = torch.randn(6, whole.n, dtype=torch.float64)
    gam = torch.randn(whole.n, whole.d, dtype=torch.float64)
    mine = gam[:, columns.start : columns.stop].contiguous()
    dW = delta_weight_reference(A, B, lam, gam, 2.0, n_out, n_in)[
        outputs.start : outputs.stop, inputs.start : inputs.stop
    ]
    torch.testing.assert_close(delta_weight(part, lam, mine, 2.0), dW, rtol=1e-11, atol=1e-11)
    x = torch.randn(5, len(inputs), dtype=torch.float64)
    for path in ("factored", "delta"):
        y = linear(x, None, None, part, lam, mine, 2.0, path)
        torch.testing.assert_close(y, x @ dW.T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sizes", [(50, 37), (37, 50)], ids=str)
def test_infinity_reaches_what_it_is_connected_to(sizes):
    layer = balanced_layer((*sizes, 16, 1), 20).without_weight()
    basis, k = layer.basis, 4
    A, B = (m != 0 for m in basis.dense(dtype=torch.float64))
    layer.x[3, k] = math.inf
    y = ours(layer, "factored")["y"]
    A_of_column = A.repeat_interleave(basis.n, 0)  # (K, d)
    reached = B[:, A_of_column[:, k]].any(1) if basis.expand else A_of_column[B[k]].any(0)
    assert 0 < reached.sum() < len(reached)
    assert torch.equal(~y[3].isfinite(), reached)
    assert y[[*range(3), *range(4, 20)]].isfinite().all()


def test_every_row_and_column_has_q():
    A, B = TernaryBasis(300, 200, 32, 1 / 16, support="balanced").dense()
    assert ((A != 0).sum(0) == 2).all() and ((B.view(300, 7, 32) != 0).sum(2) == 2).all()
    assert (B.view(300, 7, 32).any(1).sum(1) == 2).all()  # the same two in every r columns
    assert torch.equal(A.abs().unique(), torch.tensor([0.0, 4.0]))


def test_layers_of_another_n_see_the_first_columns():
    """As in version 1 and as PEFT cuts B: (D, n, r) from the front."""
    large, small = (TernaryBasis(90, d, 6, 1 / 3, support="balanced") for d in (80, 30))
    assert torch.equal(large.dense()[1][:, : small.K], small.dense()[1])
    assert torch.equal(large.dense()[0][:, :30], small.dense()[0])


# ---- the description


@pytest.mark.parametrize("density, r", [(1 / 3, 30), (0.1, 10), (0.7, 10), (0.3, 10), (1.0, 5)])
def test_densities_that_are_q_of_r(density, r):
    q = round(density * r)
    assert TernaryBasis(64, 64, r, density, support="balanced").density == q / r


@pytest.mark.parametrize(
    "density, r, near",
    [(0.07, 32, "2/32 = 0.0625 or 3/32"), (1 / 3, 32, "10/32"), (0.01, 8, "1/8")],
)
def test_densities_that_are_not(density, r, near):
    with pytest.raises(ValueError, match=f"density.*r={r}.*{near}"):
        TernaryBasis(64, 64, r, density, support="balanced")


def test_unknown_support():
    with pytest.raises(ValueError, match="support.*independent.*balanced.*got 'even'"):
        TernaryBasis(64, 64, 8, 0.5, support="even")


def test_description_sharing_and_pickling():
    one, two = (TernaryBasis(64, 96, 8, 1 / 4, support="balanced") for _ in range(2))
    other = TernaryBasis(64, 96, 8, 1 / 4)
    assert one == two and hash(one) == hash(two) and one != other
    assert one.packed()[4] is two.packed()[4]
    assert pickle.loads(pickle.dumps(one)) == one and "balanced" in repr(one)
    assert one.transposed().packed()[4] is one.packed()[4]
    assert other.support == "independent" and "balanced" not in repr(other)
    A, B = one.dense()
    imported = TernaryBasis.from_dense(A, B, 64, 96)
    assert imported.support is None and imported.format == "planes"
    assert torch.equal(imported.dense()[1], B)


def test_on_cuda_a_dense_b_pays_only_at_high_density():
    some, many = (TernaryBasis(64, 96, 8, q / 8, support="balanced") for q in (2, 5))
    assert some.format == many.format == "balanced"
    assert explain(some, 64, device="cuda").b_side == "packed"
    assert explain(many, 64, device="cuda").b_side == "dense"
    assert explain(many, 16, device="cuda").b_side == "packed"
    costs = [explain(basis, 64, device="cuda").costs for basis in (some, many)]
    assert 0 < costs[0]["factored"] < costs[1]["factored"]


@pytest.mark.parametrize(
    "position, wrong, message",
    [
        (2, lambda t: t[:-1], "offset of r \\+ 1 = 8 entries"),
        (2, lambda t: t + 1, "offset .* must ascend from 0"),
        (3, lambda t: t.int(), "rows of the dtype of a_index"),
        (3, lambda t: t[:-1], "sign"),
        (4, lambda t: t[:, :0], "sign"),
        (4, lambda t: t.long(), "sign .* int64"),
    ],
)
def test_packed_tensors_that_do_not_fit(position, wrong, message):
    layer = balanced_layer((50, 37, 7, 2), 4, torch.float32)
    packed = [*layer.basis.packed()]
    packed[position] = wrong(packed[position])
    with pytest.raises(RuntimeError, match=message):
        ops.linear(layer.x, None, None, layer.lam, layer.gam, packed, 1.0, 37, "factored")


# ---- layers


def test_layer_and_model():
    torch.manual_seed(0)
    layer = RandLoraLinear(torch.nn.Linear(48, 64), r=8, density=1 / 4, support="balanced")
    torch.nn.init.normal_(layer.randlora_lambda["default"])
    x = torch.randn(5, 48)
    P, Q = layer.get_scaled_bases("default")
    want = layer.base_layer(x) + layer.scaling["default"] * (x @ P.T) @ Q.T
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-3)
    assert "density=0.25 balanced" in repr(layer)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-3)
    layer.unmerge()
    layer.update_layer("second", 4, density=1 / 2, support="balanced")
    assert layer.bases["second"].support == "balanced"
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    apply_randlora(model, ["0"], r=4, density=1 / 4, support="balanced")
    assert model[0].bases["default"] == TernaryBasis(16, 16, 4, 1 / 4, support="balanced")


def test_compiled_layer():
    layer = RandLoraLinear(torch.nn.Linear(48, 64), r=8, density=1 / 4, support="balanced")
    torch.nn.init.normal_(layer.randlora_lambda["default"])
    x = torch.randn(5, 48)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
