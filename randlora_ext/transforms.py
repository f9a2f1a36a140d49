"""torch.func over the operators: autograd.Functions that grad, vjp and jacrev know, vmap's rules.

torch.library.register_autograd's own functions have no `setup_context` and fail under these
(pytorch#168393); ops.py takes the ones made here while a transform is active.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Rule = Callable[..., tuple]


def register(
    name: str, setup_context: Callable, gradients: Callable, rule: Rule | None = None
) -> type[torch.autograd.Function]:
    """A Function of operator randlora::name, and its vmap rule, the operator's own as well.

    Args:
        gradients: (ctx, *grads) -> those of all inputs, as for torch.library.register_autograd,
            but computed by other Functions made here.
        rule: (call, info, in_dims, *inputs) as of torch.library.register_vmap, where `call` is
            what to call with inputs that have one dimension less.
    """
    op = getattr(torch.ops.randlora, name).default
    rule = rule or one_by_one

    def jvp(ctx, *tangents):
        raise NotImplementedError(
            f"randlora::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian); "
            "reverse mode works: torch.func.grad, vjp, jacrev"
        )

    def backward(ctx, *grads):  # to a Function a list of tensors is one input
        return tuple(None if isinstance(g, list) else g for g in gradients(ctx, *grads))

    def vmap(info, in_dims, *inputs):
        return rule(partial(apply, function), info, in_dims, *inputs)

    parts = {
        "forward": lambda *inputs: op(*inputs),
        "setup_context": setup_context,
        "backward": backward,
        "jvp": jvp,
        "vmap": vmap,
    }
    parts = {key: staticmethod(part) for key, part in parts.items()}
    function = type(f"Transformed_{name}", (torch.autograd.Function,), parts)
    torch.library.register_vmap(
        f"randlora::{name}", lambda info, in_dims, *inputs: rule(op, info, in_dims, *inputs)
    )
    return function


def apply(function: type[torch.autograd.Function], *inputs):
    """`function` of the inputs; torch.compile cannot trace it, and leaves it out of its graph."""
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break("randlora_ext runs uncompiled under torch.func transforms")
    if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and loading it takes long
        return torch.compiler.disable(function.apply)(*inputs)
    return function.apply(*inputs)


def _select(value, dim, index: int):
    if isinstance(value, (list, tuple)):
        return [_select(v, d, index) for v, d in zip(value, dim, strict=True)]
    if dim is None:
        return value
    if value.shape[dim] == 0:  # for the sake of the results' shapes
        return value.new_zeros(value.movedim(dim, 0).shape[1:])
    return value.select(dim, index)


def one_by_one(call: Callable, info, in_dims: tuple, *inputs) -> tuple:
    """One call an element: where each has diagonals, or diagonals' gradients, of its own."""
    results = [call(*_select(inputs, in_dims, i)) for i in range(max(info.batch_size, 1))]

    def stacked(parts):
        return torch.stack(parts)[: info.batch_size]

    if isinstance(results[0], Tensor):
        return stacked(results), 0
    return tuple(map(stacked, zip(*results, strict=True))), (0,) * len(results[0])


def _shared(in_dims) -> bool:
    return all(dim is None for dim in tree_leaves(in_dims))


def linear(call: Callable, info, in_dims: tuple, x: Tensor, *rest) -> tuple:
    """Elements that share everything but x are so many more tokens."""
    if not _shared(in_dims[1:]):
        return one_by_one(call, info, in_dims, x, *rest)
    return call(x.movedim(in_dims[0], 0), *rest), 0


def linear_backward(
    call: Callable, info, in_dims: tuple, dy, x, weight, lam, gam, packed, scale, path, *needs
) -> tuple:
    """As `linear`, where the gradient of x alone is wanted; diagonals' are sums over tokens."""
    rest = (weight, lam, gam, packed, scale, path, *needs)
    need_x, need_diagonals = needs[:2]
    if need_diagonals or not _shared(in_dims[2:]):
        return one_by_one(call, info, in_dims, dy, x, *rest)

    def batched(value: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return value.expand(info.batch_size, *value.shape)
        return value.movedim(dim, 0)

    results = call(batched(dy, in_dims[0]), batched(x, in_dims[1]), *rest)
    return tuple(results), (0 if need_x else None, None, None)
