"""Fake kernels and autograd of `torch.ops.randlora`, beside each other, one op after the other.

The kernels and their checks are C++ (csrc/torch). The gradients are those of lambda, gamma and x
only; forward keeps x, lambda and gamma, and nothing of size (K, d), (T, K) or (D, d).
"""

import functools

import torch

from . import _C, autocast, transforms  # noqa: F401  (loading _C registers the operators)

_ops = torch.ops.randlora


def _register(name: str):
    """Decorator: the fake kernel of randlora::name."""
    return torch.library.register_fake(f"randlora::{name}")


def _autograd(name: str, backward, setup_context, rule=None, backward_rule=None):
    """Registers the gradients; returns the same for torch.func's transforms."""
    torch.library.register_autograd(f"randlora::{name}", backward, setup_context=setup_context)

    # Without this a second derivative would silently be that of a constant.
    def refuse(ctx, *grads):
        raise RuntimeError(f"randlora::{name} cannot be differentiated twice")

    torch.library.register_autograd(f"randlora::{name}_backward", refuse)

    second = transforms.register(
        f"{name}_backward", lambda ctx, inputs, output: None, refuse, backward_rule
    )
    gradients = functools.partial(backward, call=functools.partial(transforms.apply, second))
    return transforms.register(name, setup_context, gradients, rule)


def _for_inputs(ctx, *gradients):
    """One gradient an input, None for the rest: torch counts no defaulted argument as an input."""
    return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


def _together(**tensors) -> None:
    """What csrc/torch/check.cpp says of mixed devices, where a meta tensor leads here instead."""
    named = [
        (name, t)
        for name, value in tensors.items()
        for t in (value if isinstance(value, (list, tuple)) else [value])
        if t is not None
    ]
    first, reference = named[0]
    for name, t in named[1:]:
        if t.device != reference.device:
            raise RuntimeError(
                f"randlora: {name} is on {t.device} but {first} on {reference.device}; they must "
                "be on one device"
            )


# ---- generation and packing: integers, no gradients ----------------------------------------------


@_register("fill_planes_")
def _(planes, seed, role, row_start, col_start, cols, threshold):
    return None


@_register("fill_balanced_")
def _(offset, row, sign, seed, role, line_start, q, n):
    return None


@_register("balanced_to_planes")
def _(offset, row, sign, rows, n):
    words = -(-(offset.shape[0] - 1) * n // 64)
    return offset.new_empty((2, rows, words))


@_register("pack_dense")
def _(dense):
    rows, cols = dense.shape
    return (
        dense.new_empty((2, rows, (cols + 63) // 64), dtype=torch.int64),
        dense.new_empty((), dtype=torch.float64),
    )


@_register("planes_to_lists")
def _(planes, cols, by_column, wide):
    lines = cols if by_column else planes.shape[1]
    entries = torch.library.get_ctx().new_dynamic_size()
    return (
        planes.new_empty((2 * lines + 1,), dtype=torch.int64),
        planes.new_empty((entries,), dtype=torch.int32 if wide else torch.int16),
    )


@_register("planes_to_dense")
def _(planes, cols, value, dtype):
    return planes.new_empty((planes.shape[1], cols), dtype=dtype)


@_register("lists_to_dense")
def _(offset, index, cols, value, dtype):
    return offset.new_empty((offset.shape[0] // 2, cols), dtype=dtype)


# ---- scaled_basis --------------------------------------------------------------------------------


@_register("scaled_basis")
def _(A, lam, gam):
    _together(A=A, lam=lam, gam=gam)
    return A.new_empty((lam.shape[0] * lam.shape[1], A.shape[1]))


@_register("scaled_basis_backward")
def _(grad, A, lam, gam):
    _together(A=A, lam=lam, gam=gam, grad=grad)
    return lam.new_empty(lam.shape), gam.new_empty(gam.shape)


def _scaled_basis_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _scaled_basis_backward(ctx, grad, call=_ops.scaled_basis_backward):
    dlam, dgam = call(grad, *ctx.saved_tensors)
    return None, dlam, dgam


_transformed_scaled_basis = _autograd("scaled_basis", _scaled_basis_backward, _scaled_basis_context)


def scaled_basis(*inputs):
    """`torch.ops.randlora.scaled_basis`, under torch.func's transforms as well."""
    if torch._C._are_functorch_transforms_active():
        return transforms.apply(_transformed_scaled_basis, *inputs)
    return _ops.scaled_basis(*inputs)


# ---- delta_weight --------------------------------------------------------------------------------


@_register("delta_weight")
def _(lam, gam, packed, scale, out_features, in_features, expand=None):
    _together(lam=lam, gam=gam, packed=packed)
    return lam.new_empty((out_features, in_features))


@_register("delta_weight_backward")
def _(grad, lam, gam, packed, scale, expand=None):
    _together(lam=lam, gam=gam, packed=packed, grad=grad)
    return lam.new_empty(lam.shape), gam.new_empty(gam.shape)


def _delta_weight_context(ctx, inputs, output):
    lam, gam, ctx.packed, ctx.scale, _, _, ctx.expand = inputs
    ctx.save_for_backward(lam, gam)


def _delta_weight_backward(ctx, grad, call=_ops.delta_weight_backward):
    arguments = (grad, *ctx.saved_tensors, ctx.packed, ctx.scale, ctx.expand)
    dlam, dgam = call(*arguments)
    return _for_inputs(ctx, dlam, dgam, [None] * len(ctx.packed))


_transformed_delta_weight = _autograd("delta_weight", _delta_weight_backward, _delta_weight_context)


def delta_weight(*inputs):
    """`torch.ops.randlora.delta_weight`, under torch.func's transforms as well."""
    if torch._C._are_functorch_transforms_active():
        return transforms.apply(_transformed_delta_weight, *inputs)
    return _ops.delta_weight(*inputs)


# A merged weight is for serving: there is no gradient.
@_register("merged_weight")
def _(weight, lam, gam, packed, scale, rounding_seed, expand=None):
    _together(lam=lam, gam=gam, packed=packed, weight=weight)
    return weight.new_empty(weight.shape)


# ---- linear --------------------------------------------------------------------------------------


@_register("linear")
def _(x, weight, bias, lam, gam, packed, scale, out_features, path, expand=None):
    _together(x=x, lam=lam, gam=gam, packed=packed, weight=weight, bias=bias)
    return x.new_empty((*x.shape[:-1], out_features))


@_register("linear_backward")
def _(dy, x, weight, lam, gam, packed, scale, path, need_x, need_diagonals, expand=None):
    _together(x=x, lam=lam, gam=gam, packed=packed, weight=weight, dy=dy)
    return (
        x.new_empty(x.shape if need_x else (0,)),
        lam.new_empty(lam.shape if need_diagonals else (0,)),
        gam.new_empty(gam.shape if need_diagonals else (0,)),
    )


def _linear_context(ctx, inputs, output):
    x, weight, _, lam, gam, ctx.packed, ctx.scale, _, ctx.path, ctx.expand = inputs
    ctx.save_for_backward(x, weight, lam, gam)  # packed tensors are constants, shared by layers


def _linear_gradients(ctx, dy, call=None):
    """Gradients of x, weight, bias, lam, gam."""
    x, weight, lam, gam = ctx.saved_tensors
    need = ctx.needs_input_grad
    arguments = (dy, x, weight, lam, gam, ctx.packed, ctx.scale, ctx.path)
    arguments += (need[0], need[3] or need[4], ctx.expand)
    if call is not None:
        dx, dlam, dgam = call(*arguments)
    elif torch.is_grad_enabled():  # create_graph=True: the op must be able to refuse
        dx, dlam, dgam = _ops.linear_backward.default(*arguments)
    else:
        with torch._C._ExcludeDispatchKeyGuard(autocast.BELOW):
            dx, dlam, dgam = _ops.linear_backward.default(*arguments)
    # A base that trains beside the adapter (PEFT's bias="all", say) gets its ordinary gradients.
    flat = dy.reshape(-1, dy.shape[-1]) if need[1] or need[2] else None
    return (
        dx if need[0] else None,
        flat.T @ x.reshape(-1, x.shape[-1]) if need[1] else None,
        flat.sum(0) if need[2] else None,
        dlam if need[3] else None,
        dgam if need[4] else None,
    )


def _linear_backward(ctx, dy, call=None):
    return _for_inputs(ctx, *_linear_gradients(ctx, dy, call), [None] * len(ctx.packed))


_transformed_linear = _autograd(
    "linear", _linear_backward, _linear_context, transforms.linear, transforms.linear_backward
)


class _EagerLinear(torch.autograd.Function):
    """The same context and gradients without torch.library's Python layers around them.

    They cost about 0.1 ms a training step and layer: nothing for many tokens, a tenth of the
    frozen layer's time for 16.
    """

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._ExcludeDispatchKeyGuard(autocast.BELOW):
            output = _ops.linear.default(*inputs)
        _linear_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, dy):
        return *_linear_gradients(ctx, dy), None, None, None, None, None


# Without torch's wrapper of it, which looks for transforms once more.
_apply_eager = super(torch.autograd.Function, _EagerLinear).apply


def linear(*inputs):
    """`torch.ops.randlora.linear`, by the shorter way where autograd alone is at work."""
    if torch._C._are_functorch_transforms_active():
        return transforms.apply(_transformed_linear, *inputs)
    if torch.compiler.is_compiling():
        return _ops.linear(*inputs)
    return _apply_eager(*inputs)
