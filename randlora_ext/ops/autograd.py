"""Gradients of the operators: one autograd.Function each, for every way in which torch calls them.

Eager code and torch.func call the Function (`linear`, `delta_weight` and `scaled_basis` below).
torch.compile and torch.export call ``torch.ops.randlora.*``, whose Autograd key leads to the same
Function. The gradients are those of x, lambda and gamma, and of a weight and bias that train beside
the adapter. Forward keeps x, weight, lambda and gamma; nothing of size (K, d), (T, K) or (D, d).
"""

import math
import sys

import torch
from torch.autograd import Function

from . import autocast, fake_kernels, vmap  # noqa: F401  (registered on import)

_ops = torch.ops.randlora
_library = torch.library.Library("randlora", "IMPL")  # registrations live as long as this

# Inside an operator neither autograd nor autocast may act again: the kernels read what torch's GEMM
# returns there in the dtype of x. torch._C._AutoDispatchBelowAutograd excludes only autograd.
_keys = torch._C.DispatchKey
_ABOVE_KERNELS = torch._C.DispatchKeySet(_keys.AutogradFunctionality)
for _key in (_keys.AutogradOther, _keys.AutogradNestedTensor, *autocast.KEYS.values()):
    _ABOVE_KERNELS = _ABOVE_KERNELS.add(_key)


def call_kernel(op, *inputs):
    with torch._C._ExcludeDispatchKeyGuard(_ABOVE_KERNELS):
        return op(*inputs)


class Operator(Function):
    """What the Functions below share."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(
            "randlora operators have no forward-mode derivative (torch.func.jvp, jacfwd, hessian); "
            "reverse mode works: torch.func.grad, vjp, jacrev"
        )


class _RefuseTwice(Operator):
    """Hands gradients on. Without it a second derivative would silently be that of a constant."""

    @staticmethod
    def forward(gradients, *inputs):
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("randlora operators cannot be differentiated twice")


def gradients(op, *inputs):
    """Calls the backward operator `op`; differentiating its results raises."""
    results = call_kernel(op, *inputs)
    if torch.is_grad_enabled():  # create_graph=True, or a torch.func transform around this one
        tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
        return _RefuseTwice.apply(results, *tensors)
    return results


def base_gradients(dy, x, need_weight: bool, need_bias: bool):
    """Of weight and bias, which may train beside the adapter (PEFT's bias="all", say)."""
    if not need_weight and not need_bias:
        return None, None
    tokens = math.prod(dy.shape[:-1])  # vmap over nothing could not tell what -1 is
    flat = dy.reshape(tokens, dy.shape[-1])
    weight = flat.T @ x.reshape(tokens, x.shape[-1]) if need_weight else None
    return weight, flat.sum(0) if need_bias else None


class Linear(Operator):
    """``randlora::linear``; inputs as in its schema."""

    @staticmethod
    def forward(x, weight, bias, lam, gam, packed, scale, out_features, path, expand=None):
        inputs = x, weight, bias, lam, gam, packed, scale, out_features, path, expand
        return call_kernel(_ops.linear.default, *inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, lam, gam, ctx.packed, ctx.scale, _, ctx.path, ctx.expand = inputs
        ctx.save_for_backward(x, weight, lam, gam)  # packed tensors are constants

    @staticmethod
    def backward(ctx, dy):
        x, weight, lam, gam = ctx.saved_tensors
        need_x, need_weight, need_bias, need_lam, need_gam = ctx.needs_input_grad[:5]
        arguments = dy, x, weight, lam, gam, ctx.packed, ctx.scale, ctx.path
        needs = need_x, need_lam or need_gam, ctx.expand
        dx, dlam, dgam = gradients(_ops.linear_backward.default, *arguments, *needs)
        return (
            dx if need_x else None,
            *base_gradients(dy, x, need_weight, need_bias),
            dlam if need_lam else None,
            dgam if need_gam else None,
            None, None, None, None, None,
        )  # fmt: skip


class DeltaWeight(Operator):
    """``randlora::delta_weight``."""

    @staticmethod
    def forward(lam, gam, packed, scale, out_features, in_features, expand=None):
        inputs = lam, gam, packed, scale, out_features, in_features, expand
        return call_kernel(_ops.delta_weight.default, *inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        lam, gam, ctx.packed, ctx.scale, _, _, ctx.expand = inputs
        ctx.save_for_backward(lam, gam)

    @staticmethod
    def backward(ctx, grad):
        arguments = grad, *ctx.saved_tensors, ctx.packed, ctx.scale, ctx.expand
        dlam, dgam = gradients(_ops.delta_weight_backward.default, *arguments)
        return dlam, dgam, None, None, None, None, None


class ScaledBasis(Operator):
    """``randlora::scaled_basis``."""

    @staticmethod
    def forward(A, lam, gam):
        return call_kernel(_ops.scaled_basis.default, A, lam, gam)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        dlam, dgam = gradients(_ops.scaled_basis_backward.default, grad, *ctx.saved_tensors)
        return None, dlam, dgam


def entry(name: str, function: type[Function]):
    """Registers `function` at the operator's Autograd key; returns what eager code calls."""
    op = getattr(_ops, name)
    _library.impl(name, function.apply, "Autograd")
    # Function.apply binds default arguments by inspect.signature if there is a setup_context: 50 us
    # a call, a tenth of a training step of 16 tokens. This is the C++ method under it.
    apply_eager = super(Function, function).apply  # type: ignore[misc]

    def call(*inputs):
        if torch._C._are_functorch_transforms_active():
            if torch.compiler.is_dynamo_compiling():
                torch._dynamo.graph_break(
                    "randlora_ext runs uncompiled under torch.func transforms"
                )
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it is slow
                return torch.compiler.disable(function.apply)(*inputs)
            return function.apply(*inputs)
        if torch.compiler.is_compiling():
            return op(*inputs)
        return apply_eager(*inputs)

    return call


# Hadamard bases: ops/hadamard.py. Dense ones: ops/dense.py.
linear = entry("linear", Linear)
delta_weight = entry("delta_weight", DeltaWeight)
scaled_basis = entry("scaled_basis", ScaledBasis)
