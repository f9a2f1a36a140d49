"""torch.func: grad, vjp, jacrev, vmap and functional_call, against the reference in float64."""

from functools import partial

import pytest
import torch
from layer_cases import (
    basis_arguments,
    call,
    delta_by_reference,
    make_basis,
    make_layer,
    matrices,
    operator,
)
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves

from randlora_ext import delta_weight, linear
from randlora_ext.ops import dense
from randlora_ext.reference import linear_reference, scaled_basis_reference

SCALING = 0.5
CASES = [
    (9, 5, 2, 0.12), (5, 9, 2, 1 / 3), (9, 5, 2, "hadamard"), (5, 9, 2, "hadamard"),
    (9, 5, 2, "dense"), (5, 9, 2, "dense"),
]  # fmt: skip
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def setup(case):
    """(our function, the reference, inputs x, weight, bias, lam, gam; x with two leading dims)."""
    torch.manual_seed(0)
    layer = make_layer(*case, 3, lead=(4,))
    inputs = layer.x, layer.weight, layer.bias, layer.lam, layer.gam

    def ours(x, weight, bias, lam, gam):
        return call(layer, x=x, weight=weight, bias=bias, lam=lam, gam=gam)

    def reference(x, weight, bias, lam, gam):
        bases = matrices(layer.basis, torch.float64)
        return linear_reference(x, weight, bias, *bases, lam, gam, layer.scaling)

    return ours, reference, inputs


def loss(function):
    return lambda *inputs: function(*inputs).pow(2).sum()


def assert_same(transform, ours, reference, inputs):
    results, expected = (tree_leaves(transform(f)(*inputs)) for f in (ours, reference))
    assert len(results) == len(expected) > 0
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-10)


ALL = tuple(range(5))
X, DIAGONALS = (0, None, None, None, None), (None, None, None, 1, 0)
TRANSFORMS = {
    "grad": lambda f: grad(loss(f), ALL),
    "jacrev": lambda f: jacrev(f, ALL),
    "vmap over x": lambda f: vmap(f, X),
    "vmap over a last dim of x": lambda f: vmap(f, (1, None, None, None, None), out_dims=1),
    "nested vmap over x": lambda f: vmap(vmap(f, X), X),
    "gradients for each sample": lambda f: vmap(grad(loss(f), ALL), X, chunk_size=3),
    "gradients of x for each sample": lambda f: vmap(grad(loss(f)), X),
    "grad of vmap": lambda f: grad(loss(vmap(f, X)), ALL),
    "ensemble": lambda f: vmap(f, DIAGONALS),
    "ensemble, x too": lambda f: vmap(f, (0, None, None, 1, 0)),
    "ensemble of all": lambda f: vmap(f, (0, 0, 0, 1, 0)),
    "ensemble, then x": lambda f: vmap(vmap(f, X), DIAGONALS),
    "ensemble, then grad": lambda f: grad(loss(vmap(f, DIAGONALS)), ALL),
    "ensemble of gradients": lambda f: vmap(grad(loss(f), ALL), DIAGONALS),
}


@EVERY_CASE
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_linear(case, transform):
    ours, reference, (x, weight, bias, lam, gam) = setup(case)
    if "of all" in transform:
        weight, bias = normal(4, *weight.shape), normal(4, *bias.shape)
    if "ensemble" in transform:
        lam, gam = normal(lam.shape[0], 4, lam.shape[1]), normal(4, *gam.shape)
    assert_same(TRANSFORMS[transform], ours, reference, (x, weight, bias, lam, gam))


@EVERY_CASE
def test_other_functions(case):
    torch.manual_seed(0)
    basis = make_basis(*case)
    weights = partial(delta_weight, basis), partial(delta_by_reference, basis)
    weights = [partial(function, scaling=SCALING) for function in weights]
    A = matrices(basis, torch.float64)[0]
    scaled = partial(dense.scaled, A), partial(scaled_basis_reference, A)
    lam, gam = normal(4, basis.r, basis.n), normal(4, basis.n, basis.d)
    for ours, reference in (weights, scaled):
        assert_same(lambda f: vmap(f), ours, reference, (lam, gam))
        assert_same(lambda f: vmap(grad(loss(f), (0, 1))), ours, reference, (lam, gam))
        assert_same(lambda f: jacrev(f, (0, 1)), ours, reference, (lam[0], gam[0]))


@pytest.mark.parametrize("kind", [0.2, "hadamard"])
def test_bases_packed_inside_a_transform_serve_afterwards(kind):
    basis = make_basis(24, 40, 5, kind, seed=4321)  # of no other test
    x, lam, gam = normal(7, 24), normal(basis.r, basis.n), normal(basis.n, basis.d)
    vmap(grad(lambda x: linear(x, None, None, basis, lam, gam).sum()))(x)
    assert all(type(t) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(t)
               for t in basis.packed())  # fmt: skip
    y = linear(x, None, None, basis, lam.requires_grad_(), gam)
    A, B = basis.dense(dtype=torch.float64)
    torch.testing.assert_close(y, linear_reference(x, None, None, A, B, lam, gam))


# ---- what is refused


def dual(f, lam):
    with torch.autograd.forward_ad.dual_level():
        f(torch.autograd.forward_ad.make_dual(lam, lam))


def double_backward(f, lam):
    y = f(lam.requires_grad_())
    (dlam,) = torch.autograd.grad(y.pow(2).sum(), lam, create_graph=True)
    (y.sum() + dlam.pow(2).sum()).backward()


REFUSED = {
    "create_graph of ordinary autograd": double_backward,
    "jvp": lambda f, lam: jvp(f, (lam,), (lam,)),
    "dual numbers of ordinary autograd": dual,
    "hessian": lambda f, lam: hessian(lambda lam: f(lam).pow(2).sum())(lam),
    "grad of grad": lambda f, lam: grad(lambda lam: grad(loss(f))(lam).sum())(lam),
}
WORDS = "randlora operators cannot be differentiated twice|implement the jvp function"


@EVERY_CASE
@pytest.mark.parametrize("transform", REFUSED)
def test_forward_mode_and_second_derivatives_are_refused(transform, case):
    layer = make_layer(*case, 3)
    for function in (
        lambda lam: call(layer, lam=lam),
        lambda lam: delta_weight(layer.basis, lam, layer.gam),
        lambda lam: dense.scaled(layer.basis.dense(dtype=lam.dtype)[0], lam, layer.gam),
    ):
        with pytest.raises((NotImplementedError, RuntimeError), match=WORDS):
            REFUSED[transform](function, layer.lam)


OF_OPERATORS = {
    "jvp": (REFUSED["jvp"], "no torch.func transforms"),
    "grad": (lambda f, lam: grad(lambda lam: f(lam).sum())(lam), "no torch.func transforms"),
    "dual numbers of ordinary autograd": (dual, WORDS),
}


@EVERY_CASE
@pytest.mark.parametrize("name", ["linear", "linear_backward"])
@pytest.mark.parametrize("transform", OF_OPERATORS)
def test_operators_called_by_name_refuse_torch_func_and_forward_mode(transform, name, case):
    """A backward operator's tangent was zero."""
    layer = make_layer(*case, 3)
    t, bases = layer, basis_arguments(layer)

    def result(lam):
        if name == "linear":
            return operator(t.basis)(t.x, t.weight, t.bias, lam, t.gam, *bases)
        backward = operator(t.basis, "linear_backward")
        return backward(t.dy, t.x, t.weight, lam, t.gam, *bases, True, True)[0]

    transformed, words = OF_OPERATORS[transform]
    with pytest.raises((NotImplementedError, RuntimeError), match=words):
        transformed(result, layer.lam)
