"""Dense bases (PEFT's default): what only they have; test_linear.py and others try them, too."""

import math
import pickle

import pytest
import torch
from layer_cases import exact, make_layer, ours, rms_error

from randlora_ext import TernaryBasis
from randlora_ext.ops import dense


@pytest.mark.parametrize("shape", [(4096, 4096, 32), (1024, 4096, 32), (4096, 1024, 32)], ids=str)
@pytest.mark.parametrize("merges", [True, False])
def test_dw_is_formed_where_that_saves_multiply_adds(shape, merges):
    n_in, n_out, r = shape
    d, D = sorted(shape[:2])
    n, K, expand = d // r, d, n_in <= n_out

    def forms(tokens):
        sizes = (tokens, n_in), (n_out, n_in), (r, n), (n, d), (r, d), (D, K)
        x, weight, lam, gam, A, B = (torch.empty(size, device="meta") for size in sizes)
        weight = weight if merges else None
        return dense._Products(x, weight, None, lam, gam, A, B, expand, 1.0).forms

    # Of one token: three products with A'; two with B where dy B serves dx and the gradient, else
    # three. Or dW forward, for dx and for the gradient, of which W + dW adds only the last.
    factored = 3 * K * d + (2 if expand else 3) * K * D
    saved = factored - (1 if merges else 3) * d * D
    if saved <= 0:
        assert not forms(10**9)
    else:
        limit = max(256, math.ceil(2.5 * K * d * D / saved))
        assert not forms(limit - 1) and forms(limit)


@pytest.mark.parametrize(("tokens", "r"), [(64, 16), (300, 64)])
@pytest.mark.parametrize("has_weight", [True, False])
def test_float16_stays_in_range_at_full_size(tokens, r, has_weight):
    # |lambda gamma| of 0.1 is a hundred times what training reaches: elements of dW are of size
    # 0.1 sqrt(K) = 3.2, those of y and dx of 100.
    layer = make_layer(1024, 1024, r, "dense", tokens, torch.float16)
    signs = layer.lam.sign(), layer.gam.sign()
    layer.lam, layer.gam, layer.scaling = signs[0], 0.1 * signs[1], 1.0
    layer = layer if has_weight else layer.without_weight()
    oracle = exact(layer)
    for name, value in ours(layer).items():
        assert value.isfinite().all(), name
        assert rms_error(value, oracle[name]) < 3e-3, name


def test_bases_are_views_of_the_matrices_and_one_copy_in_another_dtype():
    A, B = torch.rand(4, 40), torch.rand(60, 40)
    one, other = (TernaryBasis.from_dense(A, B, *sizes) for sizes in ((40, 60), (50, 20)))
    for basis in (one, other):
        a, b = basis.packed()
        assert (a.shape, b.shape) == ((4, basis.d), (basis.D, basis.K))
        assert a.data_ptr() == A.data_ptr() and b.data_ptr() == B.data_ptr()
        assert basis.dense_b("cpu", torch.float32).data_ptr() == B.data_ptr()
    assert one.dense_b("cpu", torch.bfloat16) is one.dense_b("cpu", torch.bfloat16)
    drawn = one.dense()
    assert torch.equal(drawn[0], A) and drawn[0].data_ptr() != A.data_ptr()
    assert (one.kind, one.format, one.description, one.seed) == ("dense", "dense", None, None)
    assert "dense" in repr(one)
    again = pickle.loads(pickle.dumps(one))
    assert torch.equal(again.packed()[1], B)


def test_matrices_that_are_too_small():
    A, B = torch.ones(4, 20), torch.ones(30, 20)
    with pytest.raises(
        ValueError, match=r"A must be \(r, >= d\) = \(4, >= 21\) and B .*\(30, 20\)"
    ):
        TernaryBasis.from_dense(A, B, 21, 30)
