"""The tensors of a basis that operators take, by name (docs/formats.md)."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor


class PackedSigns(NamedTuple):
    """Of Hadamard bases: float32 signs."""

    a_signs: Tensor  # (d): of the columns of A
    row_signs: Tensor  # (D): of the rows of B
    col_signs: Tensor  # (K): of its columns


class PackedLists(NamedTuple):
    """Of sparse ternary bases: A as lists by row, B as lists by row and by column."""

    a_offset: Tensor
    a_index: Tensor
    a_tables: Tensor  # empty but on CUDA
    b_row_offset: Tensor
    b_row_index: Tensor
    b_col_offset: Tensor
    b_col_index: Tensor


class PackedPlanes(NamedTuple):
    """Of other ternary bases: A as lists by row, B as bit planes."""

    a_offset: Tensor
    a_index: Tensor
    a_tables: Tensor  # empty but on CUDA
    b_planes: Tensor


class DensePair(NamedTuple):
    """Of dense bases: A (r, d) and B (D, K)."""

    A: Tensor
    B: Tensor


Packed: TypeAlias = PackedSigns | PackedLists | PackedPlanes | DensePair


def with_each(packed: Packed, change: Callable[[Tensor], Tensor]) -> Packed:
    """The same with every tensor changed by that function."""
    return type(packed)(*map(change, packed))
