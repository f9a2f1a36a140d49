"""Hadamard bases: Sylvester's matrix between random signs (docs/basis-spec.md, section 14)."""

import torch
from torch import Tensor

from .. import devices
from .description import BasisDescription
from .shape import Shape
from .ternary import generate_planes

ROLE_FEATURES, ROLE_ROWS, ROLE_COLUMNS = 3, 4, 5  # of the specification: s, row and col


def signs(seed: int, role: int, count: int, device: torch.device) -> Tensor:
    """The first `count` signs of the infinite sequence of that role: float32, -1 or +1."""
    on = device if devices.serve(device.type) else "cpu"
    planes = generate_planes(seed, role, 0, 1, 0, count, 1.0, on)
    drawn = torch.ops.randlora.planes_to_dense(planes, count, 1.0, torch.float32)
    return drawn.flatten().to(device)


def sylvester(rows: Tensor, columns: Tensor) -> Tensor:
    """H[a, b], a in `rows`, b in `columns`: -1 if a & b has an odd number of ones, else 1."""
    ones = rows[:, None] & columns
    for shift in (32, 16, 8, 4, 2, 1):
        ones = ones ^ (ones >> shift)
    return 1 - 2 * (ones & 1)


class HadamardMatrices:
    """A and B of a description; only the signs s (d), row (D) and col (K) are drawn and stored.

    The methods are those of `TernaryMatrices`.
    """

    kind = "hadamard"
    needs_kernels = False
    density = scale = b_value = 1.0

    def __init__(self, description: BasisDescription) -> None:
        self.description = description

    def format(self, shape: Shape) -> str:
        return "hadamard"

    def pack(self, shape: Shape, on: torch.device) -> list[Tensor]:
        seed = self.description.seed
        return [
            signs(seed, ROLE_FEATURES, shape.d, on),
            signs(seed, ROLE_ROWS, shape.D, on),
            signs(seed, ROLE_COLUMNS, shape.K, on),
        ]

    def dense_a(self, shape: Shape, dtype: torch.dtype, packed: list[Tensor]) -> Tensor:
        s = packed[0]
        k = torch.arange(shape.d, device=s.device)
        return (sylvester(torch.arange(shape.r, device=s.device), k // shape.n) * s).to(dtype)

    def dense_b(self, shape: Shape, dtype: torch.dtype, packed: list[Tensor]) -> Tensor:
        _, row, col = packed
        o = torch.arange(shape.D, device=row.device)
        c = torch.arange(shape.K, device=row.device)
        return (row[:, None] * sylvester(o, c) * col).to(dtype)
