"""Dense matrices: A and B of any values, as PEFT draws them by default."""

import torch
from torch import Tensor

from .shape import Shape


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

    def check(self, shape: Shape) -> None:
        """Raises ValueError unless both are large enough for a layer of that shape."""
        A, B = tuple(self.A.shape), tuple(self.B.shape)
        if A[1] < shape.d or B[0] < shape.D or B[1] < shape.K:
            raise ValueError(
                f"A must be (r, >= d) = ({shape.r}, >= {shape.d}) and B (>= D, >= K) = "
                f"(>= {shape.D}, >= {shape.K}), got {A} and {B}"
            )

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
