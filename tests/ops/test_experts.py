"""`hadamard_weight` of stacked experts and its gradient, by the kernels and in plain torch."""

import pytest
import torch
from layer_cases import kept_by
from layer_helpers import relative

from randlora_ext import Basis
from randlora_ext.ops import hadamard
from randlora_ext.reference import delta_weight_reference

ops = torch.ops.randlora
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def problem(shape, dtype, transposed=False, experts=3):
    torch.manual_seed(0)
    n_in, n_out, r = shape
    basis = Basis(*shape, seed=3, input_scale=torch.rand(n_in) + 0.5)
    wide = torch.promote_types(dtype, torch.float32)
    lam, gam = torch.randn(experts, r, basis.n), torch.randn(experts, basis.n, basis.d)
    lam, gam = (t.to(wide).requires_grad_() for t in (lam, gam))
    W = torch.randn(experts, *((n_in, n_out) if transposed else (n_out, n_in))).to(dtype)
    *signs, expand, scale = hadamard.operands(basis, W.device, 2.0)
    return basis, W, lam, gam, (*signs, expand != transposed, scale)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(9, 5, 2), (5, 9, 2), (16, 16, 3), (37, 300, 5), (700, 100, 8)])
def test_against_the_reference(shape, dtype, transposed):
    basis, W, lam, gam, operands = problem(shape, dtype, transposed)
    A, B = basis.dense(dtype=torch.float64)
    leaves = [t.detach().double().requires_grad_() for t in (lam, gam)]
    each = zip(*leaves, strict=True)
    dW = torch.stack([delta_weight_reference(A, B, *e, 2.0, shape[1], shape[0]) for e in each])
    want = W.double() + (dW.mT if transposed else dW)
    grad = torch.randn_like(W)
    grad[1] = 0  # no token has visited this expert
    wanted = torch.autograd.grad(want, leaves, grad.double())
    out = hadamard.weight(W, lam, gam, *operands)
    diagonals = lam.detach(), gam.detach()
    for result in (out, hadamard._plain_weight(W, *diagonals, *operands)):
        assert result.dtype == dtype and relative(result, want) < TOLERANCE[dtype]
    results = [
        torch.autograd.grad(out, [lam, gam], grad, retain_graph=True),
        torch.autograd.grad(out, [lam, gam], grad.mT.contiguous().mT),
        hadamard._plain_weight_backward(grad, *diagonals, *operands),
    ]
    for result in results:
        for got, of in zip(result, wanted, strict=True):
            assert relative(got, of) < TOLERANCE[torch.promote_types(dtype, torch.float32)]
            assert not got[1].any()


def test_as_torch_wants_it(one_thread):
    _, W, lam, gam, operands = problem((5, 9, 2), torch.float64)
    torch.library.opcheck(ops.hadamard_weight.default, (W, lam, gam, *operands))
    arguments = W, lam.detach(), gam.detach(), *operands
    torch.library.opcheck(ops.hadamard_weight_backward.default, arguments)
    weight = lambda W, lam, gam: hadamard.weight(W, lam, gam, *operands)  # noqa: E731
    assert torch.autograd.gradcheck(weight, (W.requires_grad_(), lam, gam))


def test_only_lambda_and_gamma_are_kept():
    _, W, lam, gam, operands = problem((37, 300, 5), torch.float32)
    kept, _ = kept_by(lambda: hadamard.weight(W, lam, gam, *operands))
    assert {t.data_ptr() for t in kept} == {lam.data_ptr(), gam.data_ptr()}


def test_the_same_for_any_number_of_threads():
    _, W, lam, gam, operands = problem((300, 520, 16), torch.float32)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(ops.hadamard_weight_backward(W, lam.detach(), gam.detach(), *operands))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "name, shape, told",
    [
        ("gam", (2, 3, 5), "gam must have as many experts as lam (3, 2, 3)"),
        ("gam", (3, 5), "gam must have as many experts as lam (3, 2, 3)"),
        ("weight", (3, 5, 9), "weight must be (out, in) = (9, 5), got (5, 9)"),
        ("weight", (2, 9, 5), "weight must be (experts, out, in) = (3, 9, 5), got (2, 9, 5)"),
        ("weight", (9, 5), "weight must be (experts, out, in) = (3, 9, 5), got (9, 5)"),
    ],
)
def test_errors(name, shape, told):
    _, W, lam, gam, operands = problem((5, 9, 2), torch.float32)
    arguments = {"weight": W, "lam": lam, "gam": gam} | {name: torch.ones(shape)}
    with pytest.raises(RuntimeError) as error:
        ops.hadamard_weight(*arguments.values(), *operands)
    assert told in str(error.value)
