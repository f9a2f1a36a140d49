"""Dense matrices: A and B of any values, as PEFT draws them by default."""

import torch
from torch import Tensor

from .shape import Shape


class DenseMatrices:
    """A (r, >= d) and B (>= D, >= K). A layer uses the leading part.

    The methods are those of `TernaryMatrices`.
    """

    kind = "dense"
    description = None
    needs_kernels = False
    density = scale = b_value = 1.0

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = A, B
        self._copies: dict[tuple, Tensor] = {}  # of B, by device and dtype

    def check(self, shape: Shape) -> None:
        """Raises ValueError unless both are large enough for a layer of that shape."""
        A, B = tuple(self.A.shape), tuple(self.B.shape)
        d, D = shape.d, shape.D
        if A[1] < d or B[0] < D or B[1] < shape.K:
            raise ValueError(
                f"A must be (r, >= d) = ({shape.r}, >= {d}) and B (>= D, >= K) = "
                f"(>= {D}, >= {shape.K}), got {A} and {B}"
            )

    def format(self, shape: Shape) -> str:
        return "dense"

    def pack(self, shape: Shape, on: torch.device) -> list[Tensor]:
        return [self.A[:, : shape.d].to(on), self._part_of_b(shape, on, self.B.dtype)]

    def dense_a(self, shape: Shape, dtype: torch.dtype, packed: list[Tensor]) -> Tensor:
        return packed[0].to(dtype)

    def dense_b(self, shape: Shape, dtype: torch.dtype, packed: list[Tensor]) -> Tensor:
        return self._part_of_b(shape, packed[1].device, dtype)

    def _part_of_b(self, shape: Shape, on: torch.device, dtype: torch.dtype) -> Tensor:
        """A view of B, or of one copy on another device or in another dtype."""
        if (on, dtype) not in self._copies:
            self._copies[on, dtype] = self.B.to(on, dtype)
        return self._copies[on, dtype][: shape.D, : shape.K]

    def __reduce__(self):
        return DenseMatrices, (self.A, self.B)
