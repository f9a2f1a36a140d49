"""`Chunks`: which of the blocks a layer, or a slice of one, holds."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .shape import Shape


@dataclass(frozen=True)
class Chunks:
    """The blocks that a layer, or a slice of one, holds: all G chunks of d and D, or some.

    The slice's chunks of d decide its rank indices, and these its rows c of A'. A chunk of D uses
    every G-th of these rows. The rows that the slice's chunks of D use are its rows e; BlockSizes
    in csrc/core/operators.h maps e to c.
    """

    groups: int  # G of the layer
    of_d: range
    of_D: range
    ranks: range  # j of the chunks of d
    rows: int  # number of rows c of a chunk of d, K / G

    @classmethod
    def of(cls, groups: int, shape: Shape) -> "Chunks":
        """Raises ValueError unless the slice starts and ends between two chunks."""
        held = []
        for side, first, count, size in (
            ("d", shape.first_column, shape.d, shape.layer_d),
            ("D", shape.first_row, shape.D, shape.layer_D),
        ):
            width = size // groups
            if first % width or count % width:
                name = "inputs" if (side == "d") == shape.expand else "outputs"
                raise ValueError(
                    f"{name} of a slice of block bases of density=1/{groups} must start and end at "
                    f"multiples of {width}, got range({first}, {first + count}) of {size}; equal "
                    f"slices of {' or '.join(map(str, worlds(groups)))} ranks fit"
                )
            held.append(range(first // width, (first + count) // width))
        of_d, of_D = held
        q = shape.r // groups
        return cls(groups, of_d, of_D, range(of_d.start * q, of_d.stop * q), shape.K // groups)

    def held(self, lam: Tensor, shape: Shape) -> Tensor:
        """The rows of lambda (r, n) of the slice's rank indices; ValueError for another shape."""
        if tuple(lam.shape) != (shape.r, shape.n):
            raise ValueError(f"lam must be (r, n) = ({shape.r}, {shape.n}), got {tuple(lam.shape)}")
        return lam[self.ranks.start : self.ranks.stop]

    @property
    def first(self) -> int:
        """The c of e = 0, counted from the first c of the slice's chunks of d."""
        return self.of_D.start - self.phase

    @property
    def phase(self) -> int:
        return self.of_d.start * self.rows % self.groups

    @property
    def cycles(self) -> range:
        """The values of c // G of the rows e, where c counts the rows of the whole layer."""
        start = self.of_d.start * self.rows // self.groups
        return range(start, start - (self.first - len(self.of_d) * self.rows) // self.groups)

    def place(self, device: torch.device) -> Tensor:
        """What the operators must know about a slice, as the sizes of a tensor without elements."""
        of_D = len(self.of_D), self.of_D.start
        return torch.empty(0, self.groups, *of_D, self.phase, device=device)


def worlds(groups: int) -> list[int]:
    """The numbers of ranks for which every rank can hold whole chunks."""
    return [ranks for ranks in range(1, groups + 1) if groups % ranks == 0]
