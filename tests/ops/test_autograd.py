"""Autograd of the operators: opcheck, gradcheck, what is kept for backward, double backward."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from layer_cases import CALLS, call, kept_by, make_layer, with_operands
from layer_cases import opcheck as check

from randlora_ext import TernaryBasis, delta_weight, linear, scaled_basis
from randlora_ext.ops import independent

ops = torch.ops.randlora
BASES = {
    "lists": (9, 5, 2, 0.12),
    "lists reduce": (5, 9, 2, 0.12),
    "planes": (9, 5, 2, 1 / 3),
    "planes reduce": (5, 9, 2, 1 / 3),
    "wide lists": (65537, 2, 2, 0.01),
}
OTHERS = {
    "hadamard": (9, 5, 2, "hadamard"),
    "hadamard reduce": (5, 9, 2, "hadamard"),
    "dense": (9, 5, 2, "dense"),
    "dense reduce": (5, 9, 2, "dense"),
}


def detached(layer, names):
    return [getattr(layer, name).detach() for name in names.split()]


# ---- opcheck: schema, fake kernel, autograd registration, AOT dispatch with dynamic shapes


WITH_AOT = ("lists", "planes reduce")  # which takes nearly all of the time


@pytest.mark.parametrize("name", BASES)
def test_opcheck_linear(name):
    t, bases = with_operands(BASES[name])
    fast = name not in WITH_AOT
    check(ops.independent_linear, t.x, t.weight, t.bias, t.lam, t.gam, *bases, fast=fast)
    check(ops.independent_linear, t.x.detach(), None, None, t.lam, t.gam, *bases, fast=True)
    arguments = *detached(t, "dy x weight lam gam"), *bases
    backward = ops.independent_linear_backward
    check(backward, *arguments, True, True, fast=fast)
    for needs in ((True, False), (False, True)):
        check(backward, *arguments, *needs, fast=fast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_scaled_basis(dtype):
    t, low = with_operands(BASES["planes"])[0], dtype == torch.bfloat16
    A = t.basis.dense(dtype=dtype)[0]
    check(ops.scaled_basis, A, t.lam, t.gam, fast=low)
    grad = torch.ones(t.basis.K, t.basis.d, dtype=dtype)
    check(ops.scaled_basis_backward, grad, A, *detached(t, "lam gam"), fast=low)


def test_opcheck_with_strided_inputs():
    t, bases = with_operands(BASES["lists"])
    lam, gam, dy, x = (v.mT.contiguous().mT for v in detached(t, "lam gam dy x"))
    check(ops.independent_linear, x, None, None, lam, gam, *bases, fast=True)
    rest = None, lam, gam, *bases, True, True
    check(ops.independent_linear_backward, dy, x, *rest, fast=True)
    A = torch.ones(5, 2).T
    check(ops.scaled_basis, A, lam, gam, fast=True)
    check(ops.scaled_basis_backward, torch.ones(6, 5), A, lam, gam, fast=True)


def test_opcheck_packing():
    basis = TernaryBasis(11, 70, 3, 1 / 3)
    planes = basis.packed("cpu")[3]
    check(ops.planes_to_dense, planes, basis.K, 0.5, torch.float16)
    check(ops.pack_dense, basis.dense()[1])
    check(ops.fill_planes_, torch.zeros_like(planes), 1, 1, 0, 0, basis.K, 5)
    for wide in (False, True):
        check(ops.planes_to_lists, planes, basis.K, True, wide, fast=True)
        check(ops.planes_to_lists, planes, basis.K, False, wide, fast=wide)
        offset, index = ops.planes_to_lists(planes, basis.K, False, wide)
        check(ops.lists_to_dense, offset, index, basis.K, 0.5, torch.float32, fast=wide)
        tested = ("test_schema", "test_faketensor")  # entries between the tables are unset
        arguments = offset, index, basis.K
        torch.library.opcheck(ops.support_tables.default, arguments, test_utils=tested)


@pytest.mark.parametrize(
    "name, dtype", [("dense", torch.float32), ("dense reduce", torch.bfloat16)], ids=str
)
def test_opcheck_dense(name, dtype):
    t, bases = with_operands(OTHERS[name])
    x, weight, bias, dy = (v.to(dtype) for v in detached(t, "x weight bias dy"))
    A, B, expand, scale = bases
    bases = A.to(dtype), B.to(dtype), expand, scale
    check(ops.dense_linear, x.requires_grad_(), weight, bias, t.lam, t.gam, *bases)
    rest = weight, *detached(t, "lam gam"), *bases
    for needs in ((True, True), (True, False), (False, True)):
        check(ops.dense_linear_backward, dy, x.detach(), *rest, *needs, fast=not all(needs))


# ---- gradcheck


@pytest.mark.parametrize("name", [name for name in BASES | OTHERS if "wide" not in name])
def test_gradcheck(name):
    t, _ = with_operands((BASES | OTHERS)[name], torch.float64)
    basis, leaves = t.basis, [t.x, t.weight, t.bias, t.lam, t.gam]
    gradcheck, diagonals = torch.autograd.gradcheck, leaves[3:]
    assert gradcheck(lambda x, W, b, *d: linear(x, W, b, basis, *d, 0.5), leaves)
    assert gradcheck(lambda x, *d: linear(x, None, None, basis, *d), [leaves[0], *diagonals])
    assert gradcheck(lambda *d: delta_weight(basis, *d, 0.5), diagonals)
    assert gradcheck(lambda *d: scaled_basis(basis, *d), diagonals)


# ---- what is kept for backward


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


@pytest.mark.parametrize("density", [1 / 3, 0.07])
def test_scratch_does_not_grow_with_tokens(density):
    basis = TernaryBasis(50, 37, 7, density)
    lam, gam = torch.randn(7, basis.n), torch.randn(basis.n, 37)
    rest = lam, gam, *independent.operands(basis, "cpu")

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


# ---- limits that must not be silent


@CALLS
def test_backward_twice_through_a_kept_graph(basis):
    layer = make_layer(50, 37, 7, basis, 20)
    lam = layer.lam.requires_grad_()
    y = call(layer)
    first = torch.autograd.grad(y, lam, layer.dy, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, lam, layer.dy)[0], first)


@pytest.mark.parametrize("kind", [0.07, "hadamard", "dense"])
def test_an_input_changed_in_place_is_noticed(kind):
    layer = make_layer(50, 37, 7, kind, 20)
    layer.gam.requires_grad_()
    y = call(layer)
    layer.lam.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
