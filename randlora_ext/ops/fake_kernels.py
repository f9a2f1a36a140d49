"""Fake kernels: the shapes, dtypes and devices that each operator returns, for torch.compile."""

import torch

from .. import _C, kernels  # noqa: F401  (loading _C registers the operators)


def fake(function):
    """Registers `function` as the fake kernel of the operator that it is named after."""
    return torch.library.register_fake(f"randlora::{function.__name__}")(function)


def check_one_device(**tensors) -> None:
    """The check of csrc/torch/check.cpp, which calls with a meta tensor do not reach."""
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


@fake
def fill_planes_(planes, seed, role, row_start, col_start, cols, threshold):
    return None


@fake
def pack_dense(dense):
    rows, cols = dense.shape
    return (
        dense.new_empty((2, rows, (cols + 63) // 64), dtype=torch.int64),
        torch.empty((), dtype=torch.float64),  # the host reads it
    )


@fake
def planes_to_lists(planes, cols, by_column, wide):
    lines = cols if by_column else planes.shape[1]
    entries = torch.library.get_ctx().new_dynamic_size()
    return (
        planes.new_empty((2 * lines + 1,), dtype=torch.int64),
        planes.new_empty((entries,), dtype=torch.int32 if wide else torch.int16),
    )


@fake
def planes_to_dense(planes, cols, value, dtype):
    return planes.new_empty((planes.shape[1], cols), dtype=dtype)


@fake
def lists_to_dense(offset, index, cols, value, dtype):
    check_one_device(offset=offset, index=index)
    return offset.new_empty((offset.shape[0] // 2, cols), dtype=dtype)


@fake
def support_tables(a_offset, a_index, d):
    check_one_device(a_offset=a_offset, a_index=a_index)
    if not kernels.cuda_serves(a_offset.device.type):
        return []
    r, group = a_offset.shape[0] // 2, 32
    entries = (a_index.shape[0] // group + r) * group
    return [a_offset.new_empty((entries + r * d,), dtype=torch.int32)]


@fake
def scaled_basis(A, lam, gam):
    check_one_device(A=A, lam=lam, gam=gam)
    return A.new_empty((lam.shape[0] * lam.shape[1], A.shape[1]))


@fake
def scaled_basis_backward(grad, A, lam, gam):
    check_one_device(A=A, lam=lam, gam=gam, grad=grad)
    return lam.new_empty(lam.shape), gam.new_empty(gam.shape)


@fake
def delta_weight(lam, gam, packed, scale, out_features, in_features, expand=None):
    check_one_device(lam=lam, gam=gam, packed=packed)
    return lam.new_empty((out_features, in_features))


@fake
def delta_weight_backward(grad, lam, gam, packed, scale, expand=None):
    check_one_device(lam=lam, gam=gam, packed=packed, grad=grad)
    return lam.new_empty(lam.shape), gam.new_empty(gam.shape)


@fake
def merged_weight(weight, lam, gam, packed, scale, rounding_seed, expand=None):
    check_one_device(lam=lam, gam=gam, packed=packed, weight=weight)
    return weight.new_empty(weight.shape)


@fake
def add_rounded(weight, delta, rounding_seed):
    check_one_device(weight=weight, delta=delta)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@fake
def linear(x, weight, bias, lam, gam, packed, scale, out_features, path, expand=None):
    check_one_device(x=x, lam=lam, gam=gam, packed=packed, weight=weight, bias=bias)
    return x.new_empty((*x.shape[:-1], out_features))


@fake
def linear_backward(
    dy, x, weight, lam, gam, packed, scale, path, need_x, need_diagonals, expand=None
):
    check_one_device(x=x, lam=lam, gam=gam, packed=packed, weight=weight, dy=dy)
    return (
        x.new_empty(x.shape if need_x else (0,)),
        lam.new_empty(lam.shape if need_diagonals else (0,)),
        gam.new_empty(gam.shape if need_diagonals else (0,)),
    )
