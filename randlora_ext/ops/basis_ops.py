"""Fake kernels of csrc/torch/basis_ops.cpp, which randlora_ext/basis calls, and of add_rounded."""

import torch

from .. import devices
from .registration import check_one_device, fake


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
    r, group = a_offset.shape[0] // 2, 32
    entries = (a_index.shape[0] // group + r) * group
    used = devices.cuda_serves(a_offset.device.type)
    return a_offset.new_empty((entries + r * d if used else 0,), dtype=torch.int32)


@fake
def add_rounded(weight, delta, rounding_seed):
    check_one_device(weight=weight, delta=delta)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)
