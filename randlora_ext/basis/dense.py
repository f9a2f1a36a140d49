"""Dense matrices: A and B of any values, as PEFT draws them by default."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .shape import Shape
from .ternary_matrices import Packed


@dataclass(frozen=True, eq=False)  # compared by identity: comparing elements would be slow
class DenseMatrices:
    """A (r, >= d) and B (>= D, >= K). A layer uses the leading part, a slice a part of that."""

    A: Tensor
    B: Tensor
    _cast: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    kind: ClassVar = "dense"
    description: ClassVar = None
    needs_kernels: ClassVar = False
    density: ClassVar = 1.0
    scale: ClassVar = 1.0

    def check(self, shape: Shape) -> None:
        """Raises ValueError unless both are large enough for a layer of that shape."""
        A, B = tuple(self.A.shape), tuple(self.B.shape)
        d, D = shape.layer_d, shape.layer_D
        if A[0] != shape.r or A[1] < d or B[0] < D or B[1] < shape.K:
            raise ValueError(
                f"A must be (r, >= d) = ({shape.r}, >= {d}) and B (>= D, >= K) = "
                f"(>= {D}, >= {shape.K}), got {A} and {B}"
            )

    def part(
        self, shape: Shape, device: torch.device, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """A (r, d) and B (D, K) as views of the matrices, or of one copy in another dtype."""
        if (device, dtype) not in self._cast:
            self._cast[device, dtype] = self.A.to(device, dtype), self.B.to(device, dtype)
        A, B = self._cast[device, dtype]
        column, row = shape.first_column, shape.first_row
        return A[:, column : column + shape.d], B[row : row + shape.D, : shape.K]

    def format(self, shape: Shape) -> str:
        return "dense"

    def pack(self, shape: Shape, on: torch.device, name: str) -> list[Tensor]:
        return list(self.part(shape, on))

    def dense_a(self, shape: Shape, on: torch.device, dtype: torch.dtype, packed: Packed) -> Tensor:
        return packed(on)[0].to(dtype)

    def dense_b(self, shape: Shape, on: torch.device, dtype: torch.dtype, packed: Packed) -> Tensor:
        return self.part(shape, on, dtype)[1]

    def dense(self, shape: Shape, on: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        A, B = self.part(shape, on)
        return A.to(dtype, copy=True), B.to(dtype, copy=True)

    def __reduce__(self):
        return DenseMatrices, (self.A, self.B)
