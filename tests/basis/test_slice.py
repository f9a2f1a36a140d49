"""A slice of a basis, and operators on it, against the same part of the whole in plain PyTorch."""

import pickle

import pytest
import torch
from layer_cases import make_basis, rms_error

from randlora_ext import TernaryBasis, delta_weight, linear, merged_weight, scaled_basis
from randlora_ext.ops import hadamard
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

# Within classes of Hadamard bases and between them, to less than a class, and rows about N.
HADAMARD_CUTS = {
    "d cut in classes": (72, 80, 7, range(5, 48), range(80)),
    "d cut between classes": (72, 80, 6, range(24, 48), range(80)),
    "less than a class": (72, 80, 7, range(25, 31), range(80)),
    "one column": (72, 80, 7, range(71, 72), range(80)),
    "the last columns": (72, 80, 7, range(60, 72), range(80)),
    "D cut to one row": (72, 200, 7, range(72), range(199, 200)),
    "D cut beyond N": (5, 300, 2, range(5), range(290, 300)),
    "D cut about N": (30, 300, 2, range(30), range(20, 290)),
    "reduce, d cut": (200, 72, 7, range(200), range(13, 40)),
}

# Generated at a density, imported, PEFT's default; and those with cuts of their own. Operators see
# no difference between imported and generated bases.
KINDS = (1 / 16, 1 / 3, "imported lists", "imported planes", "dense", "hadamard")
CASES = {
    f"{kind}: {name}": (cut, kind)
    for kind in KINDS
    for name, cut in CUTS.items()
    if "imported" not in str(kind) or name in ("expand, d cut", "reduce, D cut to d", "both cut")
}
CASES |= {f"hadamard: {name}, too": (cut, "hadamard") for name, cut in HADAMARD_CUTS.items()}
cases = pytest.mark.parametrize("cut, kind", CASES.values(), ids=CASES)


def basis_of(kind, n_in, n_out, r, seed=3):
    if "imported" not in str(kind):
        return make_basis(n_in, n_out, r, kind, seed, torch.float32)
    generated = basis_of(1 / 16 if "lists" in kind else 1 / 3, n_in, n_out, r, seed)
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


@cases
def test_matrices_and_weights(cut, kind):
    _, _, _, inputs, outputs = cut
    whole, part, lam, gam, dW = parts(cut, kind)
    A, B = whole.dense()
    rows, columns = (outputs, inputs) if whole.expand else (inputs, outputs)
    got = part.dense()
    assert torch.equal(got[0], A[:, columns.start : columns.stop])
    assert torch.equal(got[1], B[rows.start : rows.stop])
    if kind != "hadamard":
        assert torch.equal(part.dense_a("cpu", torch.float32), got[0])
    assert (part.n, part.K, part.r) == (whole.n, whole.K, whole.r)
    assert (part.in_features, part.out_features) == (len(inputs), len(outputs))
    delta = delta_weight(part, lam, gam, 2.0)
    close(delta.detach(), dW)
    A, B = part.dense(dtype=torch.float64)
    scaled, dy = scaled_basis_reference(A, lam, gam), torch.randn_like(dW)
    M = 2.0 * B @ scaled
    want = torch.autograd.grad(M if part.expand else M.T, (lam, gam), dy, retain_graph=True)
    for ours, reference in zip(torch.autograd.grad(delta, (lam, gam), dy), want, strict=True):
        close(ours, reference)
    close(merged_weight(part, dy, lam, gam, 2.0), dy + dW)
    close(scaled_basis(part, lam, gam).detach(), scaled.detach())


def assert_linear(part, path, dtype, lam, gam, tokens=40):
    """y and gradients, by our kernels and, of Hadamard bases, by plain torch, against float64."""
    make = torch.Generator().manual_seed(1)
    features = part.in_features, part.out_features
    sizes = (tokens, features[0]), features[::-1], (tokens, features[1])
    x, W, dy = (torch.randn(size, generator=make, dtype=torch.float64).to(dtype) for size in sizes)
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [t.detach().requires_grad_() for t in (x, lam.to(wide), gam.to(wide))]
    weight = W if path == "merged" or dtype == torch.float64 else None
    y = linear(leaves[0], weight, None, part, *leaves[1:], 2.0, path)
    results = [[y.detach(), *torch.autograd.grad(y, leaves, dy)]]
    if part.kind == "hadamard":
        rest = *(t.detach() for t in leaves[1:]), *hadamard.operands(part, x.device, 2.0), False
        y = hadamard._plain_linear(x, weight, None, *rest)
        gradients = hadamard._plain_linear_backward(dy, x, weight, *rest, True, True)
        results.append([y, *gradients])
    leaves = [t.detach().double().requires_grad_() for t in leaves]
    A, B = part.dense(dtype=torch.float64)
    M = 2.0 * B @ scaled_basis_reference(A, *leaves[1:])
    total = (M if part.expand else M.T) + (0 if weight is None else weight.double())
    want = leaves[0] @ total.T
    want = [want, *torch.autograd.grad(want, leaves, dy.double())]
    limit = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 5e-3}.get(dtype, 2e-2)
    for got in results:
        assert all(rms_error(*pair) < limit for pair in zip(got, want, strict=True))


@cases
def test_linear(cut, kind):
    _, part, lam, gam, _ = parts(cut, kind)
    # Vectors and tensor cores have other tiles than float64, and 40 tokens fill several.
    for path in ("factored", "merged") if kind == "hadamard" else ("factored", "delta", "merged"):
        low = (torch.bfloat16, torch.float16) if path != "merged" else ()
        for dtype in (torch.float64, torch.float32, *low):
            assert_linear(part, path, dtype, lam, gam)


def test_transforms_of_more_than_65536():
    # K is 70,005 and N 131,072; a small part of that layer has an oracle that fits in memory.
    part = make_basis(70_001, 70_003, 5, "hadamard")
    part = part.slice(range(30_000, 30_060), range(69_950, 70_003))
    assert part.K > 65_536
    make = torch.Generator().manual_seed(1)
    lam, gam = torch.randn(5, part.n, generator=make), torch.randn(part.n, part.d, generator=make)
    for layer, path, dtype in (
        (part, "merged", torch.float64),
        (part.transposed(), "factored", torch.float32),
        (part, "factored", torch.bfloat16),
    ):
        assert_linear(layer, path, dtype, lam, gam / part.K, tokens=3)


def test_the_operators_refuse_what_does_not_fit():
    whole = TernaryBasis(144, 72, 8, 1 / 3)
    part = whole.slice(inputs=range(72, 144))  # 72 to 72: sizes alone would say d is the input side
    lam, gam, bases = torch.randn(8, 9), torch.randn(9, 72), operands(part, "cpu")
    op = torch.ops.randlora.delta_weight
    assert torch.equal(op(lam, gam, *bases).T, op(lam, gam, *bases._replace(expand=True)))
    for message, bad_lam, bad_gam, D in (
        (r"packed: b_planes .* = \(2, 36, 2\)", lam, gam, 36),
        (r"gam must be .* at most K = r \* n = 40", lam[:, :5], gam[:5], 72),
        (r"lam must be \(r, n\), got \(8, 0\)", lam[:, :0], gam[:0], 72),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(bad_lam, bad_gam, *bases._replace(D=D))


def test_slices_are_descriptions():
    whole = TernaryBasis(60, 90, 8, 1 / 16)
    part = whole.slice(outputs=range(30, 60))
    same = TernaryBasis(60, 90, 8, 1 / 16).slice(range(60), range(30, 60))
    assert part == same and hash(part) == hash(same) and part.packed() is same.packed()
    assert part != whole and part != whole.slice(outputs=range(0, 30))
    again = pickle.loads(pickle.dumps(part))
    assert again == part and not again._packed
    twice = part.slice(range(10, 40), range(10, 20)).slice(range(5, 20))
    assert twice.dense()[0].equal(whole.dense()[0][:, 15:30])
    assert twice.dense()[1].equal(whole.dense()[1][40:50])
    assert "slice from row 30 of B and column 0 of A" in repr(part)
    turned = part.transposed()
    assert (turned.in_features, turned.expand) == (30, False) and turned.packed() is part.packed()


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_everything_is_the_layer(kind):
    """A mesh of one rank: its slice and the layer may be in one process, in either order."""
    n_in, n_out, r = 64, 32, 8
    first, second = (basis_of(kind, n_in, n_out, r, seed) for seed in (1, 2))
    x, lam, gam = torch.randn(5, n_in), torch.randn(r, first.n), torch.randn(first.n, first.d)
    for whole, order in ((first, lambda pair: pair), (second, lambda pair: pair[::-1])):
        part = whole.slice(range(n_in), range(n_out))
        assert part == whole and hash(part) == hash(whole)
        got = [linear(x, None, None, b, lam, gam, 1.0, "factored") for b in order((whole, part))]
        assert torch.equal(*got)
        half = whole.slice(outputs=range(n_out // 2))
        assert half.slice() == half and half != whole


def test_only_the_slice_is_generated(monkeypatch):
    from randlora_ext.basis import ternary as module

    asked = []
    generate = module.generate_planes
    monkeypatch.setattr(
        module, "generate_planes", lambda *a: asked.append((a[3], a[5])) or generate(*a)
    )
    TernaryBasis(60, 96, 8, 1 / 16, seed=91).slice(outputs=range(24, 48)).packed()
    TernaryBasis(60, 96, 8, 1 / 16, seed=92).slice(inputs=range(15, 30)).packed()
    assert asked == [(8, 60), (24, 64), (8, 15), (96, 64)]  # rows and columns of A, of B


def test_bad_ranges():
    basis = TernaryBasis(60, 90, 8, 1 / 16)
    for span in (
        range(0),
        range(3, 3),
        range(-1, 4),
        range(5, 61),
        range(0, 10, 2),
        range(9, 3, -1),
    ):
        with pytest.raises(ValueError, match=r"inputs must be a non-empty range of step 1 within"):
            basis.slice(inputs=span)
    with pytest.raises(TypeError, match="outputs must be a range, got 4"):
        basis.slice(outputs=4)
