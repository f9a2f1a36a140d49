"""Ternary matrices, packed as index lists by row and by column or as bit planes."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .. import devices
from .description import BasisDescription
from .shape import Shape

# Above this density B is kept as bit planes (2 bits an element), at or below it as index lists by
# row and by column (32 * density bits an element): equal memory at 1/16. docs/formats.md.
PLANES_ABOVE_DENSITY = 1 / 8

_ops = torch.ops.randlora
Packed = Callable[[torch.device], list[Tensor]]  # TernaryBasis.packed, which packs once


class TernaryMatrices:
    """A and B of -1, 0 and +1 times a value, for a layer, or a slice of one, of any `shape`.

    A subclass provides the elements, as bit planes.
    """

    needs_kernels = True  # `pack` and `dense_b` need a device that our kernels serve
    kind: str
    description: BasisDescription | None
    a_value: float  # what +1 stands for in A
    b_value: float
    density: float
    scale: float  # a_value * b_value

    def a_planes(self, shape: Shape, device: torch.device) -> Tensor:
        """A of one layer as bit planes (2, r, ceil(d / 64))."""
        raise NotImplementedError

    def b_planes(self, shape: Shape, device: torch.device) -> Tensor:
        """B of one layer as bit planes (2, D, ceil(K / 64))."""
        raise NotImplementedError

    def check(self, shape: Shape) -> None:
        """Raises ValueError unless the matrices fit `shape`."""

    def format(self, shape: Shape) -> str:
        if shape.n > 65536:  # planes are decoded with 16-bit base numbers
            return "lists"
        return "planes" if self.density > PLANES_ABOVE_DENSITY else "lists"

    def pack(self, shape: Shape, on: torch.device, name: str) -> list[Tensor]:
        """The tensors of `TernaryBasis.packed`; warns, with `name`, if A or B is all zero."""
        a_planes, b_planes = self.a_planes(shape, on), self.b_planes(shape, on)
        a_offset, a_index = _ops.planes_to_lists(a_planes, shape.d, False, shape.wide)
        if self.format(shape) == "planes":
            of_b, empty_b = [b_planes], False
        else:
            by_row = _ops.planes_to_lists(b_planes, shape.K, False, shape.wide)
            by_column = _ops.planes_to_lists(b_planes, shape.K, True, shape.wide)
            of_b, empty_b = [*by_row, *by_column], by_row[1].numel() == 0
        if not shape.is_slice and (a_index.numel() == 0 or empty_b):
            warnings.warn(
                f"{name} has no non-zero element in {'B' if empty_b else 'A'}, so its adapter "
                "cannot learn anything; take a larger density",
                stacklevel=7,  # the caller of TernaryBasis.packed
            )
        a_tables = _ops.support_tables(a_offset, a_index, shape.d)  # empty but on CUDA
        return [a_offset, a_index, a_tables, *of_b]

    def dense_a(self, shape: Shape, on: torch.device, dtype: torch.dtype, packed: Packed) -> Tensor:
        """A (r, d), scaled; `packed` gives what `pack` has made on a device."""
        offset, index = packed(on)[:2]
        return _ops.lists_to_dense(offset, index, shape.d, self.a_value, dtype)

    def dense_b(self, shape: Shape, on: torch.device, dtype: torch.dtype, packed: Packed) -> Tensor:
        """The factor of GEMMs, as `TernaryBasis.dense_b`."""
        of_b = packed(on)[3:5]
        if self.format(shape) == "lists":
            return _ops.lists_to_dense(*of_b, shape.K, 1.0, dtype)
        return _ops.planes_to_dense(of_b[0], shape.K, 1.0, dtype)

    def dense(self, shape: Shape, on: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, d) and B (D, K), scaled, newly made."""
        if on.type != "meta" and not devices.serve(on.type):
            A, B = self.dense(shape, torch.device("cpu"), dtype)
            return A.to(on), B.to(on)
        a, b = self.a_planes(shape, on), self.b_planes(shape, on)
        return (
            _ops.planes_to_dense(a, shape.d, self.a_value, dtype),
            _ops.planes_to_dense(b, shape.K, self.b_value, dtype),
        )
