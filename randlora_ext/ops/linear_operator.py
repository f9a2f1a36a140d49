"""What the operators of a linear layer share, whatever its bases: `linear`, `hadamard_linear` and
`dense_linear`.

    ``NAME(x, weight, bias, lam, gam, *bases) -> y``
    ``NAME_backward(dy, x, weight, lam, gam, *bases, need_x, need_diagonals) -> dx, dlam, dgam``

`bases` are constants. A gradient that is not needed comes back empty.
"""

import math
from collections.abc import Callable

import torch

from . import autocast, vmap
from .registration import Operator, call_kernel, check_one_device, entry, gradients


def register(name: str, features: Callable[..., int]) -> Callable:
    """Registers fake kernels, gradient, vmap and autocast of `NAME` and `NAME_backward`.

    Args:
        features: out_features of ``(gam, *bases)``.

    Returns:
        What eager code calls.
    """
    forward_op = getattr(torch.ops.randlora, name).default
    backward_op = getattr(torch.ops.randlora, f"{name}_backward").default

    @torch.library.register_fake(f"randlora::{name}")
    def fake_forward(x, weight, bias, lam, gam, *bases):
        check_one_device(**_named(forward_op, x, weight, bias, lam, gam, *bases))
        return x.new_empty((*x.shape[:-1], features(gam, *bases)))

    @torch.library.register_fake(f"randlora::{name}_backward")
    def fake_backward(dy, x, weight, lam, gam, *rest):
        *_, need_x, need_diagonals = rest
        check_one_device(**_named(backward_op, dy, x, weight, lam, gam, *rest))
        return (
            x.new_empty(x.shape if need_x else (0,)),
            lam.new_empty(lam.shape if need_diagonals else (0,)),
            gam.new_empty(gam.shape if need_diagonals else (0,)),
        )

    class Linear(Operator):
        @staticmethod
        def forward(x, weight, bias, lam, gam, *bases):
            return call_kernel(forward_op, x, weight, bias, lam, gam, *bases)

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, weight, _, lam, gam, *ctx.bases = inputs
            ctx.save_for_backward(x, weight, lam, gam)

        @staticmethod
        def backward(ctx, dy):
            x, weight, lam, gam = ctx.saved_tensors
            need_x, need_weight, need_bias, need_lam, need_gam = ctx.needs_input_grad[:5]
            arguments = dy, x, weight, lam, gam, *ctx.bases, need_x, need_lam or need_gam
            dx, dlam, dgam = gradients(backward_op, *arguments)
            return (
                dx if need_x else None,
                *_base_gradients(dy, x, need_weight, need_bias),
                dlam if need_lam else None,
                dgam if need_gam else None,
                *[None] * len(ctx.bases),
            )

    vmap.register_linear(name)
    autocast.register(name)
    return entry(name, Linear)


def _named(op, *values) -> dict:
    """The values by the names of the operator's arguments."""
    return dict(zip((argument.name for argument in op._schema.arguments), values, strict=True))


def _base_gradients(dy, x, need_weight: bool, need_bias: bool):
    """Of weight and bias, which may train beside the adapter (PEFT's bias="all", say)."""
    if not need_weight and not need_bias:
        return None, None
    tokens = math.prod(dy.shape[:-1])  # vmap over nothing could not tell what -1 is
    flat = dy.reshape(tokens, dy.shape[-1])
    weight = flat.T @ x.reshape(tokens, x.shape[-1]) if need_weight else None
    return weight, flat.sum(0) if need_bias else None
