"""What registers an operator with torch: its fake kernel, its gradient, and what eager code calls.

Eager code and torch.func call an operator's autograd Function; torch.compile and torch.export call
``torch.ops.randlora.*``, whose Autograd key leads to the same Function. Forward keeps x, weight,
lambda and gamma; nothing of size (K, d), (T, K) or (D, d).
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from .. import devices  # noqa: F401  (loads the operators)
from . import autocast

_ops = torch.ops.randlora
_library = torch.library.Library("randlora", "IMPL")  # registrations live as long as this

# Inside an operator neither autograd nor autocast may act again: the kernels read what torch's GEMM
# returns there in the dtype of x. torch._C._AutoDispatchBelowAutograd excludes only autograd.
_keys = torch._C.DispatchKey
_ABOVE_KERNELS = torch._C.DispatchKeySet(_keys.AutogradFunctionality)
for _name in ("AutogradOther", "AutogradNestedTensor", *autocast.ALL_KEYS):
    _ABOVE_KERNELS = _ABOVE_KERNELS.add(getattr(_keys, _name))


# ---- fake kernels: the shapes, dtypes and devices of results, for torch.compile -----------------


def fake(function):
    """Registers `function` as the fake kernel of the operator that it is named after."""
    return torch.library.register_fake(f"randlora::{function.__name__}")(function)


def check_one_device(**tensors) -> None:
    """The check of csrc/torch/check.cpp, which calls with a meta tensor do not reach."""
    named = [
        (name, t)
        for name, value in tensors.items()
        for t in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(t, Tensor)
    ]
    first, reference = named[0]
    for name, t in named[1:]:
        if t.device != reference.device:
            raise RuntimeError(
                f"randlora: {name} is on {t.device} but {first} on {reference.device}; they must "
                "be on one device"
            )


# ---- gradients -----------------------------------------------------------------------------------


def call_kernel(op, *inputs):
    with torch._C._ExcludeDispatchKeyGuard(_ABOVE_KERNELS):
        return op(*inputs)


class Operator(Function):
    """What the Functions of our operators share."""

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
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        return _RefuseTwice.apply(results, *tensors)
    return results


def entry(name: str, function: type[Function]) -> Callable:
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
