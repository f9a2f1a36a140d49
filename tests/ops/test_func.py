"""torch.func: grad, vjp, jacrev, vmap and functional_call, against the reference in float64."""

import copy

import pytest
import torch
from layer_cases import PATHS, make_basis
from layer_helpers import randomize
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils._pytree import tree_leaves

from randlora_ext import RandLoraLinear, delta_weight, linear, scaled_basis
from randlora_ext.ops.ternary import operands
from randlora_ext.reference import delta_weight_reference, linear_reference, scaled_basis_reference

pytestmark = pytest.mark.usefixtures("one_thread")

SCALING = 0.5
BASES = {
    "lists": (9, 5, 2, 0.12),
    "planes reduce": (5, 9, 2, 1 / 3),
    "hadamard": (9, 5, 2, "hadamard"),
    "hadamard reduce": (5, 9, 2, "hadamard"),
    "dense": (9, 5, 2, "dense"),
    "dense reduce": (5, 9, 2, "dense"),
}
CASES = pytest.mark.parametrize(
    "name, path",
    [
        (name, path)
        for name in BASES
        for path in PATHS
        if not (path == "delta" and BASES[name][3] == "hadamard")
    ],
)
NAMES = pytest.mark.parametrize("name", BASES)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def setup(name, path="factored"):
    """(our function, the reference, inputs x, weight, bias, lam, gam; x with two leading dims)."""
    torch.manual_seed(0)
    basis = make_basis(*BASES[name])
    A, B = basis.dense(dtype=torch.float64)

    def ours(x, weight, bias, lam, gam):
        return linear(x, weight, bias, basis, lam, gam, SCALING, path)

    def reference(x, weight, bias, lam, gam):
        return linear_reference(x, weight, bias, A, B, lam, gam, SCALING)

    inputs = (
        normal(4, 3, basis.in_features), normal(basis.out_features, basis.in_features),
        normal(basis.out_features), normal(basis.r, basis.n), normal(basis.n, basis.d),
    )  # fmt: skip
    return ours, reference, inputs


def loss(function):
    return lambda *inputs: function(*inputs).pow(2).sum()


def assert_same(transform, ours, reference, inputs):
    results, expected = (tree_leaves(transform(f)(*inputs)) for f in (ours, reference))
    assert len(results) == len(expected) > 0
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-10, atol=1e-10)


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
}
ENSEMBLES = {
    "vmap over diagonals": lambda f: vmap(f, DIAGONALS),
    "vmap over both": lambda f: vmap(f, (0, None, None, 1, 0)),
    "vmap over all": lambda f: vmap(f, (0, 0, 0, 1, 0)),
    "vmap over diagonals, then x": lambda f: vmap(vmap(f, X), DIAGONALS),
    "grad of an ensemble": lambda f: grad(loss(vmap(f, DIAGONALS)), ALL),
    "gradients of each": lambda f: vmap(grad(loss(f), ALL), DIAGONALS),
}


@CASES
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_linear(name, path, transform):
    assert_same(TRANSFORMS[transform], *setup(name, path))


@CASES
@pytest.mark.parametrize("transform", ENSEMBLES)
def test_ensembles_of_linear(name, path, transform):
    ours, reference, (x, weight, bias, lam, gam) = setup(name, path)
    if "all" in transform:
        weight, bias = normal(4, *weight.shape), normal(4, *bias.shape)
    several = (normal(lam.shape[0], 4, lam.shape[1]), normal(4, *gam.shape))
    assert_same(ENSEMBLES[transform], ours, reference, (x, weight, bias, *several))


@NAMES
def test_other_functions(name):
    torch.manual_seed(0)
    basis = make_basis(*BASES[name])
    A, B = basis.dense(dtype=torch.float64)
    sizes = basis.out_features, basis.in_features
    pairs = [
        (
            lambda lam, gam: delta_weight(basis, lam, gam, SCALING),
            lambda lam, gam: delta_weight_reference(A, B, lam, gam, SCALING, *sizes),
        ),
        (
            lambda lam, gam: scaled_basis(basis, lam, gam),
            lambda lam, gam: scaled_basis_reference(A, lam, gam),
        ),
    ]
    lam, gam = normal(4, basis.r, basis.n), normal(4, basis.n, basis.d)
    for ours, reference in pairs:
        assert_same(lambda f: vmap(f), ours, reference, (lam, gam))
        assert_same(lambda f: vmap(grad(loss(f), (0, 1))), ours, reference, (lam, gam))
        assert_same(lambda f: jacrev(f, (0, 1)), ours, reference, (lam[0], gam[0]))


@NAMES
def test_an_ensemble_trains_by_ordinary_autograd(name):
    ours, reference, (x, weight, bias, lam, gam) = setup(name)
    leaf = normal(lam.shape[0], 4, lam.shape[1]).requires_grad_()
    gradients = [
        torch.autograd.grad(
            loss(vmap(f, (None, None, None, 1, None)))(x, weight, bias, leaf, gam), leaf
        )
        for f in (ours, reference)
    ]
    torch.testing.assert_close(*gradients)


@CASES
def test_vmap_over_nothing(name, path):
    ours, _, (x, weight, bias, lam, gam) = setup(name, path)
    out = weight.shape[0]
    assert vmap(ours, X)(x[:0], weight, bias, lam, gam).shape == (0, 3, out)
    none = lam.new_zeros(lam.shape[0], 0, lam.shape[1]), gam.new_zeros(0, *gam.shape)
    assert vmap(ours, DIAGONALS)(x, weight, bias, *none).shape == (0, 4, 3, out)
    # Gradients of all, of the weight too, where x, the weight or everything has a batch of none.
    values = x[0], weight, bias, lam, gam
    for batched in ((0,), (1,), ALL):
        arguments = [v.new_zeros(0, *v.shape) if k in batched else v for k, v in enumerate(values)]
        dims = tuple(0 if k in batched else None for k in ALL)
        gradients = vmap(grad(loss(ours), ALL), dims)(*arguments)
        assert [tuple(g.shape) for g in gradients] == [(0, *v.shape) for v in values]


def test_raw_operators_have_vmap_rules():
    ours, reference, (x, weight, bias, lam, gam) = setup("lists")
    basis = make_basis(*BASES["lists"])
    bases = operands(basis, "cpu", SCALING)

    def raw(x):
        return torch.ops.randlora.linear(x, weight, bias, lam, gam, *bases, "factored", None)

    torch.testing.assert_close(vmap(raw)(x), reference(x, weight, bias, lam, gam))


# ---- layers


def layers(count, seed=0):
    """Networks of equal frozen weights, each with diagonals of its own."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24)).double()
    nets = []
    for k in range(count):
        net = copy.deepcopy(base)
        for i, options in ((0, {"density": 0.2}), (2, {"basis": "hadamard"})):
            net[i] = randomize(RandLoraLinear(net[i], r=5, **options), seed=k + seed)
        nets.append(net)
    return nets


def trained(net):
    return {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}


def of_one(net, x):
    """Gradients of lambda and gamma by ordinary autograd."""
    net.zero_grad()
    net(x).pow(2).sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}


def test_functional_call_and_gradients_for_each_sample():
    (net,) = layers(1)
    x = normal(3, 24)

    def function(parameters, x):
        return functional_call(net, parameters, (x,)).pow(2).sum()

    gradients = vmap(grad(function), (None, 0))(trained(net), x)
    for k, sample in enumerate(x):
        for name, wanted in of_one(net, sample).items():
            torch.testing.assert_close(gradients[name][k], wanted, rtol=1e-10, atol=1e-10)
    doubled = {name: 2 * p for name, p in trained(net).items()}
    y = functional_call(net, doubled, (x,))
    for name, parameter in net.named_parameters():
        if name in doubled:
            parameter.data.mul_(2)
    assert torch.equal(y, net(x))


def test_model_ensembling():
    nets = layers(3)
    x = normal(7, 24)
    parameters, buffers = stack_module_state(nets)
    results = vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(results, torch.stack([net(x) for net in nets]))


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


REFUSED = {
    "jvp": lambda f, lam: jvp(f, (lam,), (lam,)),
    "jacfwd": lambda f, lam: jacfwd(f)(lam),
    "hessian": lambda f, lam: hessian(lambda lam: f(lam).pow(2).sum())(lam),
    "grad of grad": lambda f, lam: grad(lambda lam: grad(loss(f))(lam).sum())(lam),
    "jacrev of jacrev": lambda f, lam: jacrev(jacrev(loss(f)))(lam),
}


@pytest.mark.parametrize("function", ["linear", "delta_weight", "scaled_basis"])
@pytest.mark.parametrize("name", ["lists", "hadamard"])
@pytest.mark.parametrize("transform", REFUSED)
def test_forward_mode_and_second_derivatives_are_refused(transform, name, function):
    basis = make_basis(*BASES[name])
    x, gam = normal(3, 9), normal(basis.n, basis.d)
    functions = {
        "linear": lambda lam: linear(x, None, None, basis, lam, gam),
        "delta_weight": lambda lam: delta_weight(basis, lam, gam),
        "scaled_basis": lambda lam: scaled_basis(basis, lam, gam),
    }
    message = "randlora operators (have no forward-mode|cannot be differentiated twice)"
    with pytest.raises((NotImplementedError, RuntimeError), match=message):
        REFUSED[transform](functions[function], normal(basis.r, basis.n))


def test_forward_mode_of_ordinary_autograd_is_refused():
    ours, _, (x, weight, bias, lam, gam) = setup("lists")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(lam, torch.ones_like(lam))
        with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
            ours(x, weight, bias, dual, gam)
