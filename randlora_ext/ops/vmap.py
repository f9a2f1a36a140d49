"""torch.func.vmap over the operators: one call per element; one for `linear` if only x varies."""

from functools import partial

import torch
from torch import Tensor


def _element(value, dim, index: int):
    if isinstance(value, (list, tuple)):
        return [_element(v, d, index) for v, d in zip(value, dim, strict=True)]
    if dim is None:
        return value
    if value.shape[dim] == 0:  # an empty batch still needs the shapes of the results
        return value.new_zeros(value.movedim(dim, 0).shape[1:])
    return value.select(dim, index)


def _loop(op, info, in_dims: tuple, *inputs) -> tuple:
    """The rule that torch.library.register_vmap asks for."""
    results = [op(*_element(inputs, in_dims, i)) for i in range(max(info.batch_size, 1))]

    def stack(parts):
        return torch.stack(parts)[: info.batch_size]

    if isinstance(results[0], Tensor):
        return stack(results), 0
    return tuple(map(stack, zip(*results, strict=True))), (0,) * len(results[0])


def _is_batched(dim) -> bool:
    return any(map(_is_batched, dim)) if isinstance(dim, (list, tuple)) else dim is not None


def _linear(op, info, in_dims: tuple, x: Tensor, *rest) -> tuple:
    if any(_is_batched(dim) for dim in in_dims[1:]):
        return _loop(op, info, in_dims, x, *rest)
    return op(x.movedim(in_dims[0], 0), *rest), 0  # more tokens


def register(name: str, rule=_loop) -> None:
    call = getattr(torch.ops.randlora, name).default
    torch.library.register_vmap(f"randlora::{name}", partial(rule, call))


def register_linear(name: str) -> None:
    register(name, _linear)
    register(f"{name}_backward")
