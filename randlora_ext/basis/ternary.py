"""Ternary matrices, generated or given, packed as index lists or as bit planes."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from .. import _C
from .description import BasisDescription, Shape, as_signed
from .matrices import Matrices
from .packed import PackedLists, PackedPlanes

# Above this density B is kept as bit planes (2 bits an element), at or below it as index lists by
# row and by column (32 * density bits an element): equal memory at 1/16. docs/formats.md.
PLANES_ABOVE_DENSITY = 1 / 8
LONGEST_LINE = 2**16  # of lists, whose positions have 16 bits
ROLE_A, ROLE_B = 0, 1  # of the specification

_ops = torch.ops.randlora


class TernaryMatrices(Matrices):
    """A and B of -1, 0 and +1 times a value."""

    a_value: float  # what +1 stands for in A
    b_value: float

    @abstractmethod
    def planes(self, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
        """The elements as bit planes (2, r, ceil(d / 64)) and (2, D, ceil(K / 64))."""

    def format(self, shape: Shape) -> str:
        if shape.d > LONGEST_LINE:  # A is always lists
            raise ValueError(
                f"in_features or out_features must be at most {LONGEST_LINE} with {self.kind} "
                f"bases, got {shape.in_features} and {shape.out_features}; Hadamard bases have no "
                "such limit"
            )
        fits_lists = max(shape.D, shape.K) <= LONGEST_LINE
        return "lists" if fits_lists and self.density <= PLANES_ABOVE_DENSITY else "planes"

    def pack(self, shape: Shape, on: torch.device) -> PackedLists | PackedPlanes:
        a_planes, b_planes = self.planes(shape, on)
        a_offset, a_index = _ops.planes_to_lists(a_planes, shape.d, False)
        a_tables = _ops.support_tables(a_offset, a_index, shape.d)
        if self.format(shape) == "planes":
            return PackedPlanes(a_offset, a_index, a_tables, b_planes)
        by_row = _ops.planes_to_lists(b_planes, shape.K, False)
        by_column = _ops.planes_to_lists(b_planes, shape.K, True)
        return PackedLists(a_offset, a_index, a_tables, *by_row, *by_column)

    def dense(self, shape: Shape, on: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a_planes, b_planes = self.planes(shape, on)
        A = _ops.planes_to_dense(a_planes, shape.d, self.a_value, dtype)
        return A, _ops.planes_to_dense(b_planes, shape.K, self.b_value, dtype)


class IndependentMatrices(TernaryMatrices):
    """A and B of a description (docs/basis-spec.md), of which layers of any shape see slices."""

    kind = "independent"

    def __init__(self, description: BasisDescription) -> None:
        density = description.density
        assert density is not None
        self.description = description
        self.identity = description
        self.seed, self.density = description.seed, density
        self.threshold = _C.threshold(density)
        self.a_value = self.b_value = 1.0 / math.sqrt(density)
        self.scale = 1.0 / density  # without the square root's rounding

    def planes(self, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
        A = generate_planes(self.seed, ROLE_A, shape.r, shape.d, self.threshold, device)
        return A, generate_planes(self.seed, ROLE_B, shape.D, shape.K, self.threshold, device)


def generate_planes(
    seed: int, role: int, rows: int, cols: int, threshold: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Bit planes (2, rows, ceil(cols / 64)) of the infinite matrix of that role
    (docs/basis-spec.md), which does not depend on layer shapes. `threshold` is that of the density,
    ``_C.threshold(density)``."""
    planes = torch.empty((2, rows, -(-cols // 64)), dtype=torch.int64, device=device)
    _ops.fill_planes_(planes, as_signed(seed), role, 0, 0, cols, threshold)
    return planes


class ImportedMatrices(TernaryMatrices):
    """The leading parts of given bit planes, those of B of a matrix with so many `columns`."""

    kind = "imported"

    def __init__(
        self, a_planes: Tensor, b_planes: Tensor, columns: int, a_value: float, b_value: float
    ) -> None:
        self._a_planes, self._b_planes, self._columns = a_planes, b_planes, columns
        self.identity = self
        self.a_value, self.b_value, self.scale = a_value, b_value, a_value * b_value
        # The share of non-zeros of B decides the packed format. Eight bits at a time by a table:
        # torch has no population count.
        ones = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64)
        counts = torch.bincount(b_planes.cpu().view(torch.uint8).flatten(), minlength=256)
        self.density = max(int(counts @ ones) / (b_planes.shape[1] * columns), 2.0**-31)

    def planes(self, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
        A = _leading(self._a_planes, shape.r, shape.d)
        B = self._b_planes
        if (B.shape[1], self._columns) != (shape.D, shape.K):
            B = _leading(B, shape.D, shape.K)
        return A.to(device), B.to(device)


def _leading(planes: Tensor, rows: int, cols: int) -> Tensor:
    """The planes of the first `rows` rows and `cols` columns; bits past the last are zero."""
    part = planes[:, :rows, : -(-cols // 64)].clone(memory_format=torch.contiguous_format)
    if cols % 64:
        part[:, :, -1] &= (1 << cols % 64) - 1
    return part


def pack_dense(matrix: Tensor) -> tuple[Tensor, float] | None:
    """Bit planes of `matrix` and the value of +1; None if it is not ternary."""
    try:
        planes, value = _ops.pack_dense(matrix.cpu())
    except RuntimeError as error:
        if "randlora: dense " in str(error):
            return None
        raise  # no fault of the matrix: memory ran out
    return planes, float(value)
