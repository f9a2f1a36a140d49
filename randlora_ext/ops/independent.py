"""The operators on packed ternary bases, independent or imported (csrc/torch/independent.cpp), and
those that make bases (basis_ops.cpp). They need our kernels."""

from typing import Any

import torch
from torch import Tensor

from ..basis import Basis
from ..basis.packed import PackedLists, PackedPlanes
from ..devices import cuda_refusal, has_kernels
from . import dense
from .registration import fake, linear_entry

_ops = torch.ops.randlora
# B is given as planes or as lists; the arguments of the other format are None.
_B = "b_planes", "b_row_offset", "b_row_index", "b_col_offset", "b_col_index"


def basis_arguments(
    basis: Basis,
    device: torch.device | str,
    scaling: float = 1.0,
    dtype: torch.dtype | None = None,
    input_scale: None = None,
) -> dict[str, Any]:
    """The operators' arguments that describe the bases, in their order: the packed tensors,
    `expand` and `scale`. Raises ValueError where our kernels do not run."""
    assert input_scale is None  # goes with Hadamard bases
    on = torch.device(device)
    if not (has_kernels(on) or on.type == "meta"):
        raise ValueError(
            f"x is on {device}, where independent bases need our kernels, which are "
            f"{cuda_refusal(on)}; Hadamard and dense bases work without, in plain torch"
        )
    packed = basis.packed(device)
    assert isinstance(packed, (PackedLists, PackedPlanes))
    b: dict[str, Tensor | None] = dict.fromkeys(_B)
    if isinstance(packed, PackedPlanes):
        b["b_planes"] = packed.b_planes
    else:
        b["b_row_offset"], b["b_row_index"] = packed.b_row_offset, packed.b_row_index
        b["b_col_offset"], b["b_col_index"] = packed.b_col_offset, packed.b_col_index
    return {
        "a_offset": packed.a_offset,
        "a_index": packed.a_index,
        "a_tables": packed.a_tables if packed.a_tables.numel() else None,  # CUDA's alone
        **b,
        "expand": basis.expand,
        "scale": float(scaling * basis.scale),
    }


def _rows_of_B(b_planes, b_row_offset, **_):
    return b_row_offset.shape[0] // 2 if b_planes is None else b_planes.shape[1]


linear = linear_entry("independent_linear", _rows_of_B)
delta = dense.delta


def what_computes(basis: Basis, device: torch.device, dtype: torch.dtype, kernels: str) -> str:
    if has_kernels(device):
        return kernels
    return f"nothing: these bases need kernels, which are {cuda_refusal(device)}"


# Of the operators that make bases these are traced, where a dense basis is made.


@fake
def fill_planes_(**_):
    return None


@fake
def planes_to_dense(planes, cols, dtype, **_):
    return planes.new_empty((planes.shape[1], cols), dtype=dtype)
