"""Dense bases: two given matrices of any values."""

import torch
from torch import Tensor

from .description import Shape
from .matrices import Matrices
from .packed import DensePair


class DenseMatrices(Matrices):
    """A (r, >= d) and B (>= D, >= K), of which layers use the leading parts.

    `made_from` is only kept alive, for whoever finds these matrices by its identity.
    """

    kind = "dense"

    def __init__(self, A: Tensor, B: Tensor, made_from: object = None) -> None:
        self.A, self.B = A, B
        self.made_from = made_from
        self.identity = self

    def format(self, shape: Shape) -> str:
        return "dense"

    def pack(self, shape: Shape, on: torch.device) -> DensePair:
        return DensePair(self.A[:, : shape.d].to(on), self.B[: shape.D, : shape.K].to(on))

    def dense(self, shape: Shape, on: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        A, B = self.pack(shape, on)
        return A.to(dtype, copy=True), B.to(dtype, copy=True)
