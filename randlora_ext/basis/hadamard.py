"""Hadamard bases: Sylvester's matrix between random signs (docs/basis-spec.md, section 14)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import devices
from .description import BasisDescription
from .generated import generate_planes
from .shape import Shape
from .ternary_matrices import Packed

_ops = torch.ops.randlora
ROLE_FEATURES, ROLE_ROWS, ROLE_COLUMNS = 3, 4, 5  # of the specification: s, row and col


def signs(seed: int, role: int, first: int, count: int, device: torch.device) -> Tensor:
    """`count` signs of the infinite sequence of that role, from `first` on: int8, -1 or +1."""
    planes = generate_planes(seed, role, 0, 1, first, count, 1.0, device)
    return _ops.planes_to_dense(planes, count, 1.0, torch.float32).flatten().to(torch.int8)


def sylvester(rows: Tensor, columns: Tensor) -> Tensor:
    """H[a, b], a in `rows`, b in `columns`: -1 if a & b has an odd number of ones, else 1."""
    ones = rows[:, None] & columns
    for shift in (32, 16, 8, 4, 2, 1):
        ones = ones ^ (ones >> shift)
    return 1 - 2 * (ones & 1)


@dataclass(frozen=True)
class HadamardMatrices:
    """A and B of a description; only the signs s (d), row (D) and col (K) are drawn and stored."""

    description: BasisDescription

    kind: ClassVar = "hadamard"
    needs_kernels: ClassVar = True
    density: ClassVar = 1.0
    scale: ClassVar = 1.0

    def check(self, shape: Shape) -> None:
        """Every size fits."""

    def format(self, shape: Shape) -> str:
        return "hadamard"

    def pack(self, shape: Shape, on: torch.device, name: str) -> list[Tensor]:
        """[s, row, col] of the layer, or of a slice."""
        seed = self.description.seed
        return [
            signs(seed, ROLE_FEATURES, shape.first_column, shape.d, on),
            signs(seed, ROLE_ROWS, shape.first_row, shape.D, on),
            signs(seed, ROLE_COLUMNS, 0, shape.K, on),
        ]

    def dense_a(self, shape: Shape, on: torch.device, dtype: torch.dtype, packed: Packed) -> Tensor:
        k = torch.arange(shape.d, device=on) + shape.first_column
        H = sylvester(torch.arange(shape.r, device=on), k // shape.n)
        return (H * packed(on)[0]).to(dtype)

    def dense_b(self, shape: Shape, on: torch.device, dtype: torch.dtype, packed: Packed) -> Tensor:
        _, row, col = packed(on)
        o = torch.arange(shape.D, device=on) + shape.first_row
        return (row[:, None] * sylvester(o, torch.arange(shape.K, device=on)) * col).to(dtype)

    def dense(self, shape: Shape, on: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        def packed(device: torch.device) -> list[Tensor]:
            served = devices.serve(device.type)
            made = self.pack(shape, device if served else torch.device("cpu"), "")
            return [t.to(device) for t in made]

        return self.dense_a(shape, on, dtype, packed), self.dense_b(shape, on, dtype, packed)
