"""A slice of a basis, and operators on it, against the same part of the whole in plain PyTorch."""

import pickle

import pytest
import torch

from randlora_ext import TernaryBasis, delta_weight, linear, merged_weight, scaled_basis
from randlora_ext.basis.dense import DenseMatrices
from randlora_ext.ops.ternary import operands
from randlora_ext.reference import delta_weight_reference, scaled_basis_reference

# (in, out, r, inputs, outputs): one side cut. The last base overhangs in all; in the comments how
# the slice lies. Where its sizes alone would tell another orientation, `expand` must be believed.
CUTS = {
    "expand, D cut": (72, 200, 7, range(72), range(100, 200)),
    "expand, D cut below d": (72, 80, 7, range(72), range(33, 53)),
    "expand, d cut": (72, 80, 7, range(24, 48), range(80)),
    "reduce, D cut": (200, 72, 7, range(130, 200), range(72)),
    "reduce, D cut to d": (144, 72, 7, range(72, 144), range(72)),
    "reduce, d cut": (80, 72, 7, range(80), range(1, 13)),
    "square, in cut": (66, 66, 5, range(33, 66), range(66)),
    "both cut": (72, 80, 7, range(24, 70), range(5, 45)),
}

# Generated at a density, imported, and PEFT's default.
KINDS = (1 / 16, 1 / 3, "imported lists", "imported planes", "dense")


@pytest.fixture(params=CUTS.values(), ids=CUTS)
def cut(request):
    return request.param


def basis_of(kind, n_in, n_out, r):
    if isinstance(kind, float):
        return TernaryBasis(n_in, n_out, r, kind, seed=3)
    if kind == "dense":
        n, (d, D) = -(-min(n_in, n_out) // r), sorted((n_in, n_out))
        generator = torch.Generator().manual_seed(5)
        A, B = (torch.rand(size, generator=generator) - 0.5 for size in ((r, d), (D, n * r)))
        return TernaryBasis.from_dense(DenseMatrices(A, B), n_in, n_out)
    generated = basis_of(1 / 16 if "lists" in kind else 1 / 3, n_in, n_out, r)
    return TernaryBasis.from_ternary(*generated.dense(), n_in, n_out)


def parts(cut, kind):
    """Whole basis, slice, and lam, gam of the slice with dW of the slice from the whole."""
    n_in, n_out, r, inputs, outputs = cut
    whole = basis_of(kind, n_in, n_out, r)
    torch.manual_seed(1)
    lam = torch.randn(r, whole.n, dtype=torch.float64)
    gam = torch.randn(whole.n, whole.d, dtype=torch.float64)
    dW = delta_weight_reference(*whole.dense(dtype=torch.float64), lam, gam, 2.0, n_out, n_in)
    columns = inputs if whole.expand else outputs
    part = whole.slice(inputs, outputs)
    mine = lam.requires_grad_(), gam[:, columns.start : columns.stop].clone().requires_grad_()
    return whole, part, *mine, dW[outputs.start : outputs.stop, inputs.start : inputs.stop]


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_matrices(cut, kind):
    _, _, _, inputs, outputs = cut
    whole, part, *_ = parts(cut, kind)
    A, B = whole.dense()
    rows, columns = (outputs, inputs) if whole.expand else (inputs, outputs)
    got = part.dense()
    assert torch.equal(got[0], A[:, columns.start : columns.stop])
    assert torch.equal(got[1], B[rows.start : rows.stop])
    assert torch.equal(part.dense_a("cpu", torch.float32), got[0])
    assert (part.n, part.K, part.r) == (whole.n, whole.K, whole.r)
    assert (part.in_features, part.out_features) == (len(inputs), len(outputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ("factored", "delta", "merged"))
def test_linear(cut, kind, path):
    _, part, lam, gam, dW = parts(cut, kind)
    out_features, in_features = dW.shape
    x = torch.randn(5, in_features, dtype=torch.float64, requires_grad=True)
    weight, dy = torch.randn_like(dW), torch.randn(5, out_features, dtype=torch.float64)
    y = linear(x, weight, None, part, lam, gam, 2.0, path)
    got = y.detach(), *torch.autograd.grad(y, (x, lam, gam), dy)
    A, B = part.dense(dtype=torch.float64)
    M = 2.0 * B @ scaled_basis_reference(A, lam, gam)
    want = x @ (weight + (M if part.expand else M.T)).T
    close(got[0], x.detach() @ (weight + dW).T)
    for ours, reference in zip(got[1:], torch.autograd.grad(want, (x, lam, gam), dy), strict=True):
        close(ours, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ("factored", "delta"))
@pytest.mark.parametrize("dtype, limit", ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)))
def test_linear_in_training_dtypes(cut, kind, path, dtype, limit):
    """Vectors and tensor cores have other tiles than float64, and 40 tokens fill several."""
    _, part, lam, gam, dW = parts(cut, kind)
    x = torch.randn(40, part.in_features).to(dtype).requires_grad_()
    dy = torch.randn(40, part.out_features).to(dtype)
    small = [t.detach().float().requires_grad_() for t in (lam, gam)]
    y = linear(x, None, None, part, *small, 2.0, path)
    got = y, *torch.autograd.grad(y, (x, *small), dy)
    A, B = part.dense(dtype=torch.float64)
    wide = x.detach().double().requires_grad_()
    M = 2.0 * B @ scaled_basis_reference(A, lam, gam)
    want = wide @ (M.T if part.expand else M)
    want = want, *torch.autograd.grad(want, (wide, lam, gam), dy.double())
    for ours, reference in zip(got, want, strict=True):
        assert (ours.double() - reference).norm() < limit * reference.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_weights(cut, kind):
    _, part, lam, gam, dW = parts(cut, kind)
    got = delta_weight(part, lam, gam, 2.0)
    close(got.detach(), dW)
    G = torch.randn_like(dW)
    A, B = part.dense(dtype=torch.float64)
    M = 2.0 * B @ scaled_basis_reference(A, lam, gam)
    want = torch.autograd.grad(M if part.expand else M.T, (lam, gam), G)
    for ours, reference in zip(torch.autograd.grad(got, (lam, gam), G), want, strict=True):
        close(ours, reference)
    weight = torch.randn_like(dW)
    close(merged_weight(part, weight, lam, gam, 2.0), weight + dW)
    close(scaled_basis(part, lam, gam).detach(), scaled_basis_reference(A, lam, gam).detach())


def test_the_operators_refuse_what_does_not_fit():
    whole = TernaryBasis(144, 72, 8, 1 / 3)
    part = whole.slice(inputs=range(72, 144))  # 72 to 72: sizes alone would say d is the input side
    lam, gam, bases = torch.randn(8, 9), torch.randn(9, 72), operands(part, "cpu")
    op = torch.ops.randlora.delta_weight
    turned = bases._replace(expand=True)
    assert op(lam, gam, *bases).shape == (72, 72)
    assert torch.equal(op(lam, gam, *bases).T, op(lam, gam, *turned))
    with pytest.raises(RuntimeError, match=r"packed: b_planes .* = \(2, 36, 2\)"):
        op(lam, gam, *bases._replace(D=36))
    with pytest.raises(RuntimeError, match=r"gam must be .* at most K = r \* n = 40"):
        op(lam[:, :5], gam[:5], *bases)
    with pytest.raises(RuntimeError, match=r"lam must be \(r, n\), got \(8, 0\)"):
        op(lam[:, :0], gam[:0], *bases)


def test_slices_are_descriptions():
    whole = TernaryBasis(60, 90, 8, 1 / 16)
    part = whole.slice(outputs=range(30, 60))
    same = TernaryBasis(60, 90, 8, 1 / 16).slice(range(60), range(30, 60))
    assert part == same and hash(part) == hash(same) and part.packed() is same.packed()
    assert part != whole and part != whole.slice(outputs=range(0, 30))
    again = pickle.loads(pickle.dumps(part))
    assert again == part and not again._packed
    assert part.slice(outputs=range(10, 20)).dense()[1].equal(whole.dense()[1][40:50])
    assert "slice from row 30 of B and column 0 of A" in repr(part)
    turned = part.transposed()
    assert (turned.in_features, turned.expand) == (30, False) and turned.packed() is part.packed()


@pytest.mark.parametrize("kind", (*KINDS, "hadamard"))
@pytest.mark.parametrize("sizes", ((32, 64, 8), (64, 32, 8), (32, 32, 8)))
def test_a_slice_of_everything_is_the_layer(kind, sizes):
    """A mesh of one rank: its slice and the layer may be in one process, in either order."""
    if kind == "hadamard":
        first, second = (TernaryBasis(*sizes, seed=seed, kind=kind) for seed in (1, 2))
    else:
        first, second = basis_of(kind, *sizes), basis_of(kind, *sizes)
    n_in, n_out, r = sizes
    x, lam, gam = torch.randn(5, n_in), torch.randn(r, first.n), torch.randn(first.n, first.d)
    for whole, order in ((first, lambda pair: pair), (second, lambda pair: pair[::-1])):
        part = whole.slice(range(n_in), range(n_out))
        assert part == whole and hash(part) == hash(whole)
        for path in ("factored",) if kind == "hadamard" else ("factored", "delta"):
            got = [linear(x, None, None, b, lam, gam, 1.0, path) for b in order((whole, part))]
            assert torch.equal(*got)
        half = whole.slice(outputs=range(n_out // 2))
        assert half.slice() == half and half != whole


def test_only_the_slice_is_generated(monkeypatch):
    from randlora_ext.basis import generated as module

    asked = []
    generate = module.generate_planes
    monkeypatch.setattr(
        module, "generate_planes", lambda *a: asked.append((a[3], a[5])) or generate(*a)
    )
    TernaryBasis(60, 96, 8, 1 / 16, seed=91).slice(outputs=range(24, 48)).packed()
    TernaryBasis(60, 96, 8, 1 / 16, seed=92).slice(inputs=range(15, 30)).packed()
    assert asked == [(8, 60), (24, 64), (8, 15), (96, 64)]  # rows and columns of A, of B


@pytest.mark.parametrize(
    "span", (range(0), range(3, 3), range(-1, 4), range(5, 61), range(0, 10, 2), range(9, 3, -1))
)
def test_bad_ranges(span):
    with pytest.raises(ValueError, match=r"inputs must be a non-empty range of step 1 within"):
        TernaryBasis(60, 90, 8, 1 / 16).slice(inputs=span)


def test_bad_arguments():
    basis = TernaryBasis(60, 90, 8, 1 / 16)
    with pytest.raises(TypeError, match="outputs must be a range, got 4"):
        basis.slice(outputs=4)
