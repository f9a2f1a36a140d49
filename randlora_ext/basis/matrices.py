"""`Matrices`: what `TernaryBasis` asks of generated, block, imported and dense matrices."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .chunks import Chunks
from .description import BasisDescription
from .shape import Shape

Packed = Callable[[torch.device], list[Tensor]]  # TernaryBasis.packed, which packs once


class Matrices(Protocol):
    """A and B of one kind, for any layer, or slice of one, of a `shape` that they fit."""

    @property
    def kind(self) -> str: ...
    @property
    def description(self) -> BasisDescription | None: ...
    @property
    def density(self) -> float: ...
    @property
    def scale(self) -> float: ...
    @property
    def needs_kernels(self) -> bool:
        """Whether `pack` and `dense_b` need a device that our kernels serve."""

    def check(self, shape: Shape) -> None:
        """Raises ValueError unless they fit."""

    def format(self, shape: Shape) -> str: ...

    def chunks(self, shape: Shape) -> Chunks | None:
        """What is held of block matrices; None of other kinds, which have no chunks."""

    def pack(self, shape: Shape, on: torch.device, name: str) -> list[Tensor]:
        """The tensors of `TernaryBasis.packed`, and a warning about `name` if one is empty."""

    def dense_a(self, shape: Shape, on: torch.device, dtype: torch.dtype, packed: Packed) -> Tensor:
        """A (r, d), scaled; `packed` gives what `pack` has made on a device."""

    def dense_b(self, shape: Shape, on: torch.device, dtype: torch.dtype, packed: Packed) -> Tensor:
        """The factor of GEMMs, as `TernaryBasis.dense_b`."""

    def dense(self, shape: Shape, on: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, d) and B (D, K), scaled, newly made."""
