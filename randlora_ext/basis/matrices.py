"""`Matrices`: what every kind of bases provides, for layers of any shape."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .description import BasisDescription, Shape
from .packed import Packed


class Matrices(ABC):
    """A and B of one kind, of which a layer takes a part of its own shape."""

    kind: str
    description: BasisDescription | None = None  # None if the matrices were given
    density = 1.0
    scale = 1.0  # by which the product of the packed matrices must be multiplied
    identity: object  # equal for equal matrices

    @abstractmethod
    def format(self, shape: Shape) -> str:
        """How they are packed for such a layer (docs/formats.md). ValueError if they cannot be."""

    @abstractmethod
    def pack(self, shape: Shape, on: torch.device) -> Packed:
        """The tensors of `Basis.packed`, on a device where they can be made."""

    @abstractmethod
    def dense(self, shape: Shape, on: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`Basis.dense`, on such a device."""
