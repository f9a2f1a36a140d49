"""Generated matrices: a pure function of a `BasisDescription` (docs/basis-spec.md)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from .description import BasisDescription, as_signed
from .shape import Shape
from .ternary_matrices import TernaryMatrices

_ops = torch.ops.randlora
ROLE_A, ROLE_B = 0, 1  # of the specification


def generate_planes(
    seed: int,
    role: int,
    row_start: int,
    rows: int,
    col_start: int,
    cols: int,
    density: float,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Bit planes (2, rows, ceil(cols / 64)) of any slice of the infinite matrix of that role.

    Equivalent to slicing the infinite matrix of docs/basis-spec.md; independent of layer shapes.
    """
    planes = torch.empty((2, rows, -(-cols // 64)), dtype=torch.int64, device=device)
    limit = _C.threshold(density)
    _ops.fill_planes_(planes, as_signed(seed), role, row_start, col_start, cols, limit)
    return planes


@dataclass(frozen=True)
class GeneratedMatrices(TernaryMatrices):
    """A and B of a description; layers of different shapes see slices of the same matrices."""

    description: BasisDescription

    def __post_init__(self) -> None:
        density = self.description.density
        assert density is not None
        value = 1.0 / math.sqrt(density)
        for name, its in (
            ("kind", self.description.kind),
            ("density", density),
            ("a_value", value),
            ("b_value", value),
            ("scale", 1.0 / density),  # without the square root's rounding
        ):
            object.__setattr__(self, name, its)

    def a_planes(self, shape: Shape, device: torch.device) -> Tensor:
        seed, density = self.description.seed, self.density
        columns = shape.first_column, shape.d
        return generate_planes(seed, ROLE_A, 0, shape.r, *columns, density, device)

    def b_planes(self, shape: Shape, device: torch.device) -> Tensor:
        seed, density = self.description.seed, self.density
        return generate_planes(seed, ROLE_B, shape.first_row, shape.D, 0, shape.K, density, device)
