"""Slices of block bases against the same part of the whole layer, in fp64 and as in training."""

import pytest
import torch
from layer_cases import one_thread  # noqa: F401

from randlora_ext import TernaryBasis, delta_weight, linear, merged_weight, scaled_basis
from randlora_ext.ops import functional
from randlora_ext.reference import delta_weight_reference, scaled_basis_reference

# in, out, r, G, and the chunks of inputs and outputs that a slice holds (None: all). K / G is a
# multiple of G in the first ones, so that all chunks have equally many rows; in the others not.
CUTS = [
    ((64, 96, 8, 4), range(1, 2), None),
    ((64, 96, 8, 4), None, range(2, 4)),
    ((96, 64, 8, 4), range(3, 4), None),
    ((96, 64, 8, 4), None, range(1, 3)),
    ((64, 64, 16, 2), range(1, 2), range(1, 2)),
    ((36, 72, 6, 3), range(1, 3), None),  # d = 24, r = 4 by classes
    ((130, 70, 10, 5), None, range(2, 3)),  # 14 rows
    ((130, 70, 10, 5), range(1, 4), None),
    ((72, 160, 16, 8), range(3, 5), None),  # 10 rows
    ((72, 160, 16, 8), None, range(7, 8)),
    ((160, 72, 16, 8), None, range(1, 8)),
    ((72, 160, 16, 8), range(3, 6), range(5, 7)),
    ((16, 32, 32, 4), range(2, 3), None),  # r > d
]


@pytest.fixture(params=["operators", "plain torch"])
def served(request, monkeypatch):
    if request.param == "plain torch":
        monkeypatch.setattr(functional, "serve", lambda device_type: False)
    return request.param == "operators"


@pytest.fixture(params=CUTS, ids=str)
def cut(request):
    (n_in, n_out, r, G), *chunks = request.param
    whole = TernaryBasis(n_in, n_out, r, 1 / G, 3, "block")
    inputs, outputs = (
        range(size) if c is None else range(c.start * size // G, c.stop * size // G)
        for c, size in zip(chunks, (n_in, n_out), strict=True)
    )
    return whole, inputs, outputs


def indices(span):
    return slice(span.start, span.stop)


def parts(cut):
    """Slice, its lam and gam, and its dW from the whole layer."""
    whole, inputs, outputs = cut
    torch.manual_seed(1)
    lam = torch.randn(whole.r, whole.n, dtype=torch.float64, requires_grad=True)
    gam = torch.randn(whole.n, whole.d, dtype=torch.float64)
    sizes = whole.out_features, whole.in_features
    dW = delta_weight_reference(*whole.dense(dtype=torch.float64), lam.detach(), gam, 2.0, *sizes)
    gam = gam[:, indices(inputs if whole.expand else outputs)].clone().requires_grad_()
    return whole.slice(inputs, outputs), lam, gam, dW[indices(outputs), indices(inputs)]


def reference(part, lam, gam):
    A, B = part.dense(dtype=torch.float64)
    M = 2.0 * B @ scaled_basis_reference(A, lam, gam)
    return M if part.expand else M.T


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_matrices(cut):
    whole, inputs, outputs = cut
    part, (A, B) = whole.slice(inputs, outputs), whole.dense()
    columns, rows = (inputs, outputs) if whole.expand else (outputs, inputs)
    assert torch.equal(part.dense()[0], A[:, indices(columns)])
    assert torch.equal(part.dense()[1], B[indices(rows)])
    assert torch.equal(part.dense_a("cpu", torch.float32), A[:, indices(columns)])
    share = len(inputs) * len(outputs) / (whole.in_features * whole.out_features)
    spare = 8 * -(-part.D // 64) * 2 * whole.description.groups  # rows within a cycle
    a, b, place = part.packed()
    assert place.numel() == 0 and a.numel() * whole.d == whole.packed()[0].numel() * part.d
    assert b.numel() <= share * whole.packed()[1].numel() + spare


@pytest.mark.parametrize("path", ("factored", "delta", "merged"))
def test_linear(cut, served, path):
    if not served and path != "factored":
        pytest.skip("plain torch has the factored path alone")
    part, lam, gam, dW = parts(cut)
    for tokens in (0, 1, 5, 40):
        x = torch.randn(tokens, part.in_features, dtype=torch.float64, requires_grad=True)
        weight, dy = torch.randn_like(dW), torch.randn(tokens, part.out_features).double()
        y = linear(x, weight, None, part, lam, gam, 2.0, path)
        want = x @ (weight + reference(part, lam, gam)).T
        close(y.detach(), x.detach() @ (weight + dW).T)
        for ours, theirs in zip(
            torch.autograd.grad(y, (x, lam, gam), dy),
            torch.autograd.grad(want, (x, lam, gam), dy),
            strict=True,
        ):
            close(ours, theirs)


@pytest.mark.parametrize("path", ("factored", "delta"))
@pytest.mark.parametrize(
    "dtype, limit", ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3))
)
def test_linear_in_training_dtypes(cut, served, path, dtype, limit):
    if not served and path != "factored":
        pytest.skip("plain torch has the factored path alone")
    part, lam, gam, _ = parts(cut)
    x = torch.randn(40, part.in_features).to(dtype).requires_grad_()
    dy = torch.randn(40, part.out_features).to(dtype)
    small = [t.detach().float().requires_grad_() for t in (lam, gam)]
    y = linear(x, None, None, part, *small, 2.0, path)
    wide = x.detach().double().requires_grad_()
    want = wide @ reference(part, lam, gam).T
    want = want, *torch.autograd.grad(want, (wide, lam, gam), dy.double())
    got = y, *torch.autograd.grad(y, (x, *small), dy)
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.double() - theirs).norm() < limit * theirs.norm()


def test_weights(cut, served):
    part, lam, gam, dW = parts(cut)
    got, want = delta_weight(part, lam, gam, 2.0), reference(part, lam, gam)
    close(got.detach(), dW)
    G = torch.randn_like(dW)
    for ours, theirs in zip(
        torch.autograd.grad(got, (lam, gam), G),
        torch.autograd.grad(want, (lam, gam), G),
        strict=True,
    ):
        close(ours, theirs)
    weight = torch.randn_like(dW)
    close(merged_weight(part, weight, lam, gam, 2.0), weight + dW)
    A = part.dense(dtype=torch.float64)[0]
    close(scaled_basis(part, lam, gam).detach(), scaled_basis_reference(A, lam, gam).detach())


def test_compiled(served):
    part = TernaryBasis(72, 160, 16, 1 / 8, 3, "block").slice(inputs=range(27, 45))
    lam, gam, x = torch.randn(16, part.n), torch.randn(part.n, part.d), torch.randn(20, 18)

    def step(x, lam, gam):
        return linear(x, None, None, part, lam, gam)

    leaves = [t.requires_grad_() for t in (x, lam, gam)]
    got, want = torch.compile(step, backend="aot_eager", fullgraph=True)(*leaves), step(*leaves)
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_slices_of_slices_and_of_other_layers():
    whole = TernaryBasis(72, 160, 16, 1 / 8, 3, "block")
    part = whole.slice(outputs=range(40, 120))
    assert part.slice(outputs=range(20, 60)) == whole.slice(outputs=range(60, 100))
    other = TernaryBasis(72, 320, 16, 1 / 8, 3, "block").slice(outputs=range(40, 120))
    assert other != part and not torch.equal(other.dense()[1], part.dense()[1])
    turned = part.transposed()
    assert all(a is b for a, b in zip(turned.packed(), part.packed(), strict=True))


def test_what_does_not_fit(served):
    basis = TernaryBasis(64, 96, 8, 1 / 4, kind="block")
    with pytest.raises(ValueError, match=r"outputs .* multiples of 24, got range\(32, 64\) of 96"):
        basis.slice(outputs=range(32, 64))
    with pytest.raises(ValueError, match="equal slices of 1 or 2 or 4 ranks fit"):
        basis.slice(inputs=range(21))
    part = basis.slice(inputs=range(16))
    with pytest.raises(ValueError, match=r"lam must be .*\(8, 8\),? "):
        linear(torch.randn(3, 16), None, None, part, torch.randn(2, 8), torch.randn(8, 16))
