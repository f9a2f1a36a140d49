"""Dense matrices: A and B of any values, as PEFT draws them by default."""

import torch
from torch import Tensor

from .description import Shape


class DenseMatrices:
    """A (r, >= d) and B (>= D, >= K), of which a layer uses the leading parts.

    The methods are those of `TernaryMatrices`.
    """

    kind = "dense"
    description = input_scale = None
    needs_kernels = False
    density = scale = b_value = 1.0

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B, self.key = A, B, self

    def format(self, shape: Shape) -> str:
        return "dense"

    def pack(self, shape: Shape, on: torch.device) -> list[Tensor]:
        return [self.A[:, : shape.d].to(on), self.B[: shape.D, : shape.K].to(on)]

    def dense_a(self, shape: Shape, dtype: torch.dtype, packed: list[Tensor]) -> Tensor:
        return packed[0].to(dtype)

    def dense_b(self, shape: Shape, dtype: torch.dtype, packed: list[Tensor]) -> Tensor:
        return packed[1].to(dtype)

    def __reduce__(self):
        return DenseMatrices, (self.A, self.B)
