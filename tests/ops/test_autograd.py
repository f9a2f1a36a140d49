"""Autograd of the operators: opcheck, gradcheck, what is kept for backward."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from layer_cases import CALLS, call, kept_by, make_layer, operator, with_basis_arguments

from randlora_ext import Basis
from randlora_ext.ops import independent

ops = torch.ops.randlora
LISTS, PLANES = (9, 5, 2, 0.12), (5, 9, 2, 1 / 3)
HADAMARD, DENSE = ((9, 5, 2, kind) for kind in ("hadamard", "dense"))


def check(op, *arguments, fast=False) -> None:
    """Schema, fake kernel, autograd; unless fast, AOT dispatch, which takes most of the time."""
    fast_ones = ("test_schema", "test_autograd_registration", "test_faketensor")
    options = {"test_utils": fast_ones} if fast else {}
    torch.library.opcheck(op.default, arguments, **options)


@pytest.mark.parametrize(
    "case, dtype, fast",
    [
        (LISTS, torch.float32, False), ((5, 9, 2, 0.12), torch.bfloat16, True),
        (PLANES, torch.float32, False), ((9, 5, 2, 1 / 3), torch.float16, True),
        (HADAMARD, torch.float32, False), ((5, 9, 2, "hadamard"), torch.float16, True),
        (DENSE, torch.float32, False), ((5, 9, 2, "dense"), torch.bfloat16, False),
    ],
    ids=str,
)  # fmt: skip
def test_opcheck_linear(case, dtype, fast):
    t, bases = with_basis_arguments(case, dtype)
    rest = t.lam, t.gam, *bases
    forward, backward = operator(t.basis), operator(t.basis, "linear_backward")
    check(forward, t.x, t.weight, t.bias, *rest, fast=fast)
    check(forward, t.x.detach().mT.contiguous().mT, None, None, *rest, fast=True)
    dy, x, weight, lam, gam = (v.detach() for v in (t.dy, t.x, t.weight, t.lam, t.gam))
    for needs in ((True, True), (True, False), (False, True)):
        check(backward, dy, x, weight, lam, gam, *bases, *needs, fast=fast or not all(needs))
    turned = (v.mT.contiguous().mT for v in (lam, gam))
    check(backward, dy, x, None, *turned, *bases, True, True, fast=True)
    if case[3] == "hadamard":
        for base in (weight, None):
            check(ops.hadamard_weight, base, *rest, fast=fast or base is None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_scaled_basis(dtype):
    t, low = with_basis_arguments(PLANES)[0], dtype == torch.bfloat16
    A, grad = t.basis.dense(dtype=dtype)[0], torch.ones(t.basis.K, t.basis.d, dtype=dtype)
    lam, gam = t.lam.detach(), t.gam.detach()
    check(ops.scaled_basis, A.T.contiguous().T, t.lam, t.gam, fast=low)
    check(ops.scaled_basis_backward, grad, A.T.contiguous().T, lam, gam, fast=low)


def test_opcheck_packing():
    basis = Basis(11, 70, 3, 1 / 3)
    planes = basis.packed("cpu").b_planes
    check(ops.planes_to_dense, planes, basis.K, 0.5, torch.float16)
    check(ops.fill_planes_, planes.clone(), 5, 1, 3, 7, basis.K, 2**30)


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@CALLS
@pytest.mark.parametrize("shape", [(80, 44, 8), (44, 80, 8)], ids=str)
def test_linear_keeps_nothing_new(shape, basis, dtype):
    layer = make_layer(*shape, basis, 20, dtype)
    basis, packed = layer.basis, layer.basis.packed("cpu")
    x, lam, gam = (leaf.requires_grad_() for leaf in (layer.x, layer.lam, layer.gam))
    kept, y = kept_by(lambda: call(layer))
    allowed = {storage(t) for t in (x, layer.weight, lam, gam, *packed)}
    assert kept and all(storage(t) in allowed for t in kept)
    forbidden = {basis.K * basis.d, 20 * basis.K, basis.D * basis.d}
    own = [t for t in kept if storage(t) not in {storage(layer.weight), *map(storage, packed)}]
    assert forbidden.isdisjoint(t.numel() for t in own)
    y.backward(layer.dy)  # and it suffices
    assert lam.grad.any() and gam.grad.any() and x.grad.any()


@CALLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bare", [False, True])
def test_a_frozen_adapter_keeps_no_activation(basis, dtype, bare):
    changes = {"weight": None, "bias": None} if bare else {}
    layer = make_layer(44, 80, 8, basis, 300, dtype)
    x = layer.x.requires_grad_()
    y = call(layer, **changes, lam=layer.lam.requires_grad_())
    (expected,) = torch.autograd.grad(y, x, layer.dy)
    layer.lam.requires_grad_(False)
    inner = x * 1  # as another layer's result
    kept, y = kept_by(lambda: call(layer, **changes, x=inner))
    assert storage(inner) not in {storage(t) for t in kept if t is not None}
    inner.detach().zero_()
    (got,) = torch.autograd.grad(y, x, layer.dy)
    assert got.any() and torch.equal(got, expected)


@pytest.mark.parametrize("density", [1 / 3, 0.07])
def test_scratch_does_not_grow_with_tokens(density):
    basis = Basis(50, 37, 7, density)
    lam, gam = torch.randn(7, basis.n), torch.randn(basis.n, 37)
    rest = lam, gam, *independent.basis_arguments(basis, "cpu").values()

    def scratch(tokens):
        x, dy = torch.randn(tokens, 50), torch.randn(tokens, 37)
        torch.set_num_threads(2)
        with torch.profiler.profile(profile_memory=True) as profile:
            results = [ops.independent_linear(x, None, None, *rest)]
            results += ops.independent_linear_backward(dy, x, None, *rest, True, True)
        events = profile.profiler.kineto_results.events()
        allocated = sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")
        return allocated - sum(t.nbytes for t in results)

    def in_a_new_thread(tokens):  # a thread keeps its scratch for the next call
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(scratch, tokens).result()

    assert in_a_new_thread(4096) == in_a_new_thread(512) > 0


@CALLS
def test_backward_twice_through_a_kept_graph_but_not_after_a_change_in_place(basis):
    layer = make_layer(50, 37, 7, basis, 20)
    gam = layer.gam.requires_grad_()
    y = call(layer)
    first, again = (torch.autograd.grad(y, gam, layer.dy, retain_graph=True)[0] for _ in "12")
    assert torch.equal(again, first)
    layer.lam.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@CALLS
@pytest.mark.parametrize("lead", [(), (2, 3), (0,)], ids=str)
def test_gradients_of_weight_and_bias_are_those_of_a_linear_layer(basis, lead):
    layer = make_layer(8, 5, 2, basis, 1, torch.float64)
    x, dy = layer.x.new_ones(*lead, 8), layer.dy.new_ones(*lead, 5)
    leaves = layer.weight.requires_grad_(), layer.bias.requires_grad_()
    mine = torch.autograd.grad(call(layer, x=x), leaves, dy)
    true = torch.autograd.grad(torch.nn.functional.linear(x, *leaves), leaves, dy)
    torch.testing.assert_close(mine, true)
    mine[1].zero_()  # which is no memory of dy
    assert bool((dy == 1).all())
