"""What torch asks of an operator: fake kernel, gradient, vmap, autocast; and what eager code calls.

Eager code and torch.func call an operator's autograd Function; torch.compile and torch.export call
``torch.ops.randlora.*``, whose Autograd key leads to the same Function. Forward keeps weight,
lambda, gamma and, unless all of them are frozen, x; nothing of size (K, d), (T, K) or (D, d).
"""

import itertools
import sys
from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor
from torch.autograd import Function

from .. import devices  # noqa: F401  (loads the operators)

_ops = torch.ops.randlora


# ---- plain torch ---------------------------------------------------------------------------------


def plain(name: str, function: Callable) -> None:
    """Registers what computes the operator on devices without our kernels. On cards without them
    csrc/torch checks the arguments and calls it as NAME_plain; the dispatcher takes csrc/torch on
    every card once the CUDA library is loaded."""
    torch.library.impl(f"randlora::{name}", "default", function)
    _, _, schema = str(getattr(_ops, name).default._schema).partition("(")
    torch.library.define(f"randlora::{name}_plain", f"({schema}")
    torch.library.impl(f"randlora::{name}_plain", "default", function)


# ---- fake kernels: the shapes, dtypes and devices of results, for torch.compile ------------------


def fake(function: Callable, operator: str = "") -> Callable:
    """Registers the fake kernel of `operator`, or of the one that has the function's name. It gets
    the operator's arguments by their names.

    It repeats the check of csrc/torch/check.cpp that calls with a meta tensor never reach.
    """
    operator = operator or function.__name__
    names = _argument_names(operator)

    def checked(*args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        on = {name: str(t.device) for name, t in given.items() if isinstance(t, Tensor)}
        if len({*on.values()}) > 1:
            raise RuntimeError(f"randlora: arguments must be on one device, got {on}")
        return function(**given)

    torch.library.register_fake(f"randlora::{operator}")(checked)
    return function


def _fake_backward(lam, gam, x=None, need_dx=None, need_dlam_dgam=True, **_):
    """Of every backward operator; those of linear layers return dx, too, and None if not needed."""
    dlam, dgam = None, None
    if need_dlam_dgam:
        dlam, dgam = lam.new_empty(lam.shape), gam.new_empty(gam.shape)
    if need_dx is None:  # not of a linear layer
        return dlam, dgam
    dx = x.new_empty(x.shape) if need_dx else None
    return dx, dlam, dgam


def _argument_names(operator: str) -> list[str]:
    return [argument.name for argument in getattr(_ops, operator).default._schema.arguments]


# ---- autocast ------------------------------------------------------------------------------------


def autocast_is_on(device_type: str) -> bool:
    """torch.is_autocast_enabled, but False for "meta", for which that raises."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast(device_type: str, t: Tensor) -> Tensor:
    """A floating tensor other than float64 in autocast's dtype; others as they are."""
    if t.dtype is torch.float64 or not t.is_floating_point():
        return t
    return t.to(torch.get_autocast_dtype(device_type))


def _register_autocast(name: str, cast: Collection[str]) -> None:
    """Casts the arguments `cast`, as torch those of F.linear; inside autocast is off, since the
    kernels read what torch's GEMM returns in the dtype of x. torch.library.register_autocast would
    cast lambda and gamma as well, and always to one dtype."""
    op = getattr(_ops, name).default
    is_cast = [argument in cast for argument in _argument_names(name)]
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def casting(*inputs, device_type=device_type):
            inputs = list(inputs)
            for i, value in enumerate(inputs):
                if is_cast[i] and value is not None:
                    inputs[i] = autocast(device_type, value)
            torch.set_autocast_enabled(device_type, False)  # torch.autocast would take 10 us
            try:
                return op(*inputs)
            finally:
                torch.set_autocast_enabled(device_type, True)

        torch.library.impl(f"randlora::{name}", key, casting)


# ---- vmap: one call per element ------------------------------------------------------------------


def _vmap(op, info, in_dims: tuple, *inputs) -> tuple:
    """The rule that torch.library.register_vmap asks for."""

    def elements(value, dim):
        if dim is None:
            return itertools.repeat(value)
        # An empty batch still needs the shapes of the results.
        return value.unbind(dim) or [value.new_zeros(value.movedim(dim, 0).shape[1:])]

    calls = zip(*map(elements, inputs, in_dims), strict=False)
    results = [op(*arguments) for arguments in calls]

    def stack(parts):
        if parts[0] is None:
            return None
        return torch.stack(parts)[: info.batch_size]  # none of an empty batch

    if isinstance(results[0], Tensor):
        return stack(results), 0
    stacked = [stack(parts) for parts in zip(*results, strict=True)]
    dims = [None if each is None else 0 for each in stacked]
    return tuple(stacked), tuple(dims)


# ---- gradients -----------------------------------------------------------------------------------


class Operator(Function):
    """What the Functions of our operators share; `entry` gives them their forward.

    They keep the tensors of a basis as attributes of ctx: hooks of saved tensors, which move
    activations to the CPU, would copy them in every layer.
    """

    generate_vmap_rule = True


def _below_autograd(op, *inputs):
    # So that autograd does not act again; nothing public does this.
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def _differentiable(function: type[Function], *inputs):
    # Gradient mode is off in compiled code. In backward it is on only with create_graph=True or
    # under torch.func.
    if torch.is_grad_enabled():
        return function.apply(*inputs)
    return function.forward(*inputs)


def _dispatched(function: type[Function], *inputs):
    """The Autograd kernel of an operator."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "torch.ops.randlora has no torch.func transforms but vmap; call linear or delta_weight "
            "of randlora_ext, which have others, too"
        )
    return _differentiable(function, *inputs)


class _Backward(Operator):
    """Without it a second derivative would silently be that of a constant."""

    forward = staticmethod(_below_autograd)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("randlora operators cannot be differentiated twice")


# Calls a backward operator; differentiating its results raises.
gradients = partial(_differentiable, _Backward)


def entry(name: str, function: type[Function], cast: Collection[str] = ()) -> Callable:
    """Registers for the operator `name` its gradient, that one's fake kernel, vmap, and autocast of
    the arguments `cast`. Returns what eager code calls; it takes the arguments that describe the
    bases by name, in the operator's order."""
    op = getattr(_ops, name)
    forward = partial(_below_autograd, op.default)
    function.forward = staticmethod(forward)  # type: ignore[method-assign]
    torch.library.impl(f"randlora::{name}", "Autograd", partial(_dispatched, function))
    fake(_fake_backward, f"{name}_backward")
    backward = f"{name}_backward"
    of_gradients = partial(_dispatched, _Backward, getattr(_ops, backward).default)
    torch.library.impl(f"randlora::{backward}", "Autograd", of_gradients)
    for each in (name, backward):
        rule = partial(_vmap, getattr(_ops, each).default)
        torch.library.register_vmap(f"randlora::{each}", rule)
    _register_autocast(name, cast)
    _register_autocast(backward, ())  # which keeps the dtypes of forward
    # Function.apply binds default arguments by inspect.signature if there is a setup_context: 8 us
    # a call (docs/decisions/autograd-entry.md). This is the C++ method under it.
    apply_eager = super(Function, function).apply  # type: ignore[misc]

    def call(*inputs, **bases):
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace cannot record the kernels of randlora_ext; use torch.export or "
                "torch.compile, or merge the adapters first"
            )
        if torch._C._are_functorch_transforms_active():
            if torch.compiler.is_dynamo_compiling():
                torch._dynamo.graph_break(
                    "randlora_ext runs uncompiled under torch.func transforms"
                )
            # Where it is not imported nothing is compiled, and importing it is slow.
            imported = "torch._dynamo" in sys.modules
            apply = torch.compiler.disable(function.apply) if imported else function.apply
            return apply(*inputs, *bases.values())
        if torch.compiler.is_compiling():
            return op(*inputs, **bases)
        return apply_eager(*inputs, *bases.values())

    return call


def linear_entry(name: str, rows_of_B: Callable) -> Callable:
    """As `entry`, of a linear layer ``(x, weight, bias, lam, gam, *basis) -> y``; `basis` describes
    the bases. Its backward is ``(dy, x, weight, lam, gam, *basis, need_dx, need_dlam_dgam) ->
    (dx, dlam, dgam)``, each None if it is not needed."""

    def fake_linear(x, gam, expand, **basis):
        return x.new_empty((*x.shape[:-1], rows_of_B(**basis) if expand else gam.shape[1]))

    fake(fake_linear, name)
    backward_op = getattr(_ops, f"{name}_backward").default
    before_basis = "x", "weight", "bias", "lam", "gam"
    no_gradients = [None] * (len(_argument_names(name)) - len(before_basis))  # of the bases

    class Linear(Operator):
        @staticmethod
        def setup_context(ctx, inputs, output):
            x, weight, _, lam, gam, *ctx.basis = inputs
            _, need_weight, _, need_lam, need_gam, *_ = ctx.needs_input_grad
            # Beside a frozen adapter x may be freed or changed in place.
            keep_x = need_weight or need_lam or need_gam
            ctx.in_features = x.shape[-1]
            ctx.save_for_backward(x if keep_x else None, weight, lam, gam)

        @staticmethod
        def backward(ctx, dy):
            x, weight, lam, gam = ctx.saved_tensors
            need_x, need_weight, need_bias, need_lam, need_gam, *_ = ctx.needs_input_grad
            if x is None:  # the operator reads its shape alone
                x = dy.new_empty(()).expand(*dy.shape[:-1], ctx.in_features)
            inputs = dy, x, weight, lam, gam, *ctx.basis, need_x, need_lam or need_gam
            dx, dlam, dgam = gradients(backward_op, *inputs)
            # They may train beside the adapter (PEFT's bias="all").
            tokens = [*range(dy.dim() - 1)]
            dweight = torch.tensordot(dy, x, (tokens, tokens)) if need_weight else None
            dbias = dy.unsqueeze(0).flatten(0, -2).sum(0) if need_bias else None
            return dx, dweight, dbias, dlam, dgam, *no_gradients

    return entry(name, Linear, cast=("x", "weight", "bias", "B"))
