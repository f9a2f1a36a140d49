"""Hadamard bases: Sylvester's matrix between random signs (docs/basis-spec.md, section 14)."""

import torch
from torch import Tensor

from .description import BasisDescription, Shape
from .matrices import Matrices
from .packed import PackedSigns
from .ternary import generate_planes

# Of the specification: for a_signs, row_signs and col_signs.
ROLE_FEATURES, ROLE_ROWS, ROLE_COLUMNS = 3, 4, 5
_NO_ZEROS = 2**31  # the threshold of density 1


def signs(seed: int, role: int, count: int, device: torch.device) -> Tensor:
    """The first `count` signs of the infinite sequence of that role: float32, -1 or +1."""
    planes = generate_planes(seed, role, 1, count, _NO_ZEROS, device)
    return torch.ops.randlora.planes_to_dense(planes, count, 1.0, torch.float32).flatten()


def sylvester(rows: Tensor, columns: Tensor) -> Tensor:
    """H[a, b], a in `rows`, b in `columns`: -1 if a & b has an odd number of ones, else 1."""
    ones = rows[:, None] & columns
    for shift in (32, 16, 8, 4, 2, 1):
        ones = ones ^ (ones >> shift)
    return 1 - 2 * (ones & 1)


class HadamardMatrices(Matrices):
    """A and B of a description; only their signs are drawn and stored."""

    kind = "hadamard"

    def __init__(self, description: BasisDescription) -> None:
        self.description = description
        self.identity = description
        self.seed = description.seed

    def format(self, shape: Shape) -> str:
        return "hadamard"

    def pack(self, shape: Shape, on: torch.device) -> PackedSigns:
        return PackedSigns(
            a_signs=signs(self.seed, ROLE_FEATURES, shape.d, on),
            row_signs=signs(self.seed, ROLE_ROWS, shape.D, on),
            col_signs=signs(self.seed, ROLE_COLUMNS, shape.K, on),
        )

    def dense(self, shape: Shape, on: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a_signs, row_signs, col_signs = self.pack(shape, on)
        sizes = shape.r, shape.d, shape.D, shape.K
        j, k, o, c = (torch.arange(size, device=a_signs.device) for size in sizes)
        A = sylvester(j, k // shape.n) * a_signs
        B = row_signs[:, None] * sylvester(o, c) * col_signs
        return A.to(dtype), B.to(dtype)
