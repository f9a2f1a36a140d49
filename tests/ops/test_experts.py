"""`hadamard_weight` of stacked experts and its gradient, by the kernels and in plain torch."""

import pytest
import torch
from layer_cases import delta_by_reference, kept_by
from layer_helpers import relative

from randlora_ext import Basis
from randlora_ext.ops import hadamard

ops = torch.ops.randlora
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def problem(shape, dtype, transposed=False, experts=3, own="none"):
    """The basis, the scales of every expert, tensors, bases. `own`: which signs each has."""
    torch.manual_seed(0)
    n_in, n_out, r = shape
    scales = torch.rand(1 if own == "none" else experts, n_in) + 0.5
    basis = Basis(*shape, seed=3)
    scales = scales.expand(experts, -1)
    wide = torch.promote_types(dtype, torch.float32)
    lam, gam = torch.randn(experts, r, basis.n), torch.randn(experts, basis.n, basis.d)
    lam, gam = (t.to(wide).requires_grad_() for t in (lam, gam))
    W = torch.randn(experts, *((n_in, n_out) if transposed else (n_out, n_in))).to(dtype)
    of_input = scales[0] if own == "none" else scales
    bases = hadamard.basis_arguments(basis, W.device, 2.0, input_scale=of_input)
    a_signs, row_signs, col_signs, expand, scale = bases.values()
    if own == "both":
        a_signs, row_signs = (
            t if t.dim() == 2 else t.repeat(experts, 1) for t in (a_signs, row_signs)
        )
    return basis, scales, W, lam, gam, (a_signs, row_signs, col_signs, expand != transposed, scale)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("own", ["none", "input", "both"])
@pytest.mark.parametrize("shape", [(9, 5, 2), (5, 9, 2), (16, 16, 3), (37, 300, 5), (700, 100, 8)])
def test_against_the_reference(shape, own, dtype, transposed):
    basis, scales, W, lam, gam, bases = problem(shape, dtype, transposed, own=own)
    leaves = [t.detach().double().requires_grad_() for t in (lam, gam)]
    each = zip(*leaves, scales, strict=True)
    dW = torch.stack([delta_by_reference(basis, lam, gam, 2.0, scale) for lam, gam, scale in each])
    want = W.double() + (dW.mT if transposed else dW)
    grad = torch.randn_like(W)
    grad[1] = 0  # no token has visited this expert
    wanted = torch.autograd.grad(want, leaves, grad.double())
    out = hadamard.weight(W, lam, gam, *bases)
    diagonals = lam.detach(), gam.detach()
    for result in (out, hadamard._plain_weight(W, *diagonals, *bases)):
        assert result.dtype == dtype and relative(result, want) < TOLERANCE[dtype]
    apart = [t.detach().mT.contiguous().mT for t in (W, lam, gam)]  # not contiguous
    assert torch.equal(ops.hadamard_weight(*apart, *bases), out)
    results = [
        torch.autograd.grad(out, [lam, gam], grad, retain_graph=True),
        torch.autograd.grad(out, [lam, gam], grad.mT.contiguous().mT),
        ops.hadamard_weight_backward(grad, *apart[1:], *bases),
        hadamard._plain_weight_backward(grad, *diagonals, *bases),
    ]
    for result in results:
        for got, of in zip(result, wanted, strict=True):
            assert relative(got, of) < TOLERANCE[torch.promote_types(dtype, torch.float32)]
            assert not got[1].any()


def test_as_torch_wants_it():
    *_, W, lam, gam, bases = problem((5, 9, 2), torch.float64, own="both")
    torch.library.opcheck(ops.hadamard_weight.default, (W, lam, gam, *bases))
    arguments = W, lam.detach(), gam.detach(), *bases
    torch.library.opcheck(ops.hadamard_weight_backward.default, arguments)
    weight = lambda W, lam, gam: hadamard.weight(W, lam, gam, *bases)  # noqa: E731
    assert torch.autograd.gradcheck(weight, (W.requires_grad_(), lam, gam))


def test_only_lambda_and_gamma_are_kept():
    *_, W, lam, gam, bases = problem((37, 300, 5), torch.float32)
    kept, _ = kept_by(lambda: hadamard.weight(W, lam, gam, *bases))
    assert {t.data_ptr() for t in kept} == {lam.data_ptr(), gam.data_ptr()}


@pytest.mark.parametrize(
    "name, shape, told",
    [
        ("gam", (2, 3, 5), "gam must have as many experts as lam (3, 2, 3)"),
        ("gam", (3, 5), "gam must have as many experts as lam (3, 2, 3)"),
        ("weight", (3, 5, 9), "weight must be (out, in) = (9, 5), got (5, 9)"),
        ("weight", (2, 9, 5), "weight must be (experts, out, in) = (3, 9, 5), got (2, 9, 5)"),
        ("weight", (9, 5), "weight must be (experts, out, in) = (3, 9, 5), got (9, 5)"),
        (
            "a_signs",
            (2, 5),
            "a_signs must be (d), or contiguous (experts, d) with experts = 3, got (2, 5)",
        ),
        (
            "row_signs",
            (2, 9),
            "row_signs must be (D), or contiguous (experts, D) with experts = 3, got (2, 9)",
        ),
        (
            "a_signs",
            (3, 4),
            "a_signs must have d = 5 numbers for gam (3, 5) float32 on cpu, got (4)",
        ),
        (
            "row_signs",
            (1, 3, 9),
            "row_signs must be a contiguous float32 tensor (D), got (1, 3, 9)",
        ),
        ("col_signs", (3, 6), "col_signs must be a contiguous float32 tensor (K), got (3, 6)"),
    ],
)
def test_errors(name, shape, told):
    *_, W, lam, gam, bases = problem((5, 9, 2), torch.float32)
    a_signs, row_signs, col_signs, *rest = bases
    arguments = {
        "weight": W,
        "lam": lam,
        "gam": gam,
        "a_signs": a_signs,
        "row_signs": row_signs,
        "col_signs": col_signs,
    }
    arguments[name] = torch.ones(shape)
    with pytest.raises(RuntimeError) as error:
        ops.hadamard_weight(*arguments.values(), *rest)
    assert told in str(error.value)


def test_a_layer_alone_takes_vectors():
    *_, W, lam, gam, (a_signs, row_signs, *rest) = problem((5, 9, 2), torch.float32, own="both")
    with pytest.raises(
        RuntimeError, match=r"a_signs must be a contiguous float32 tensor \(d\), got \(3"
    ):
        ops.hadamard_weight(W[0], lam[0], gam[0], a_signs, row_signs[0], *rest)
    with pytest.raises(RuntimeError, match=r"row_signs must be .*\(D\), got \(3, 9\)"):
        ops.hadamard_linear(
            torch.ones(1, 5), W[0], None, lam[0], gam[0], a_signs[0], row_signs, *rest
        )
