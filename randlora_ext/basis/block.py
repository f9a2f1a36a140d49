"""Block matrices: A and B of dense blocks in G = 1 / density groups (docs/basis-spec.md)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .description import as_signed
from .generated import ROLE_A, GeneratedMatrices, generate_planes
from .shape import Shape

_ops = torch.ops.randlora


def fits(groups: int, in_features: int, out_features: int, r: int) -> bool:
    """Whether blocks of these sizes exist and give a dW without zeros, which takes G^2 <= K."""
    K = Shape.of(in_features, out_features, r).K  # refuses what is no size
    q = r // groups
    divides = all(size % groups == 0 for size in (in_features, out_features, r))
    return divides and q & (q - 1) == 0 and groups * groups <= K


def check_sizes(groups: int, in_features: int, out_features: int, r: int) -> None:
    """Raises ValueError, naming the densities that fit, unless 1 / groups does."""
    sizes = in_features, out_features
    if not fits(groups, *sizes, r):
        possible = _densities([sizes], r)
        instead = (
            f"densities that fit: {possible}"
            if possible
            else "no density fits; take another r, or basis='independent'"
        )
        raise ValueError(f"{_needs(groups, *sizes, r)}; {instead}")


def check_layers(groups: int, layers: Mapping[str, tuple[int, int]], r: int) -> None:
    """`check_sizes` for all (in_features, out_features) of a model, by the layers' names.

    Raises ValueError that names the first layer that does not fit and the densities that fit all.
    """
    for name, sizes in layers.items():
        if not fits(groups, *sizes, r):
            possible = _densities(layers.values(), r)
            instead = (
                f"densities that fit all {len(layers)} targeted layers: {possible}. Take one of "
                "them, another r"
                if possible
                else f"no density fits all {len(layers)} targeted layers. Take another r"
            )
            raise ValueError(
                f"layer {name!r} does not fit: {_needs(groups, *sizes, r)}; {instead}, or leave "
                "that layer out of target_modules"
            )


def _needs(groups: int, in_features: int, out_features: int, r: int) -> str:
    return (
        f"block bases of density=1/{groups} need in_features, out_features and r to be multiples "
        f"of {groups}, r / {groups} to be a power of two and r * ceil(min(in, out) / r) to be "
        f"{groups * groups} or more, got {in_features}, {out_features} and r={r}"
    )


def _densities(layers: Collection[tuple[int, int]], r: int) -> str:
    possible = [g for g in range(2, r + 1) if all(fits(g, *sizes, r) for sizes in layers)]
    return ", ".join(f"1/{g}" for g in possible)


@dataclass(frozen=True)
class Chunks:
    """What a layer, or a slice of one, holds of the blocks: all G chunks of d and D, or some.

    The slice's chunks of d bring rank indices and with them rows c of A'; those of D bring every
    G-th of these rows, its rows e. csrc/core/operators.h (BlockSizes) says which e is which c.
    """

    groups: int  # G of the layer
    of_d: range
    of_D: range
    ranks: range  # j of the chunks of d
    rows: int  # c of a chunk of d, K / G

    @classmethod
    def of(cls, groups: int, shape: Shape) -> "Chunks":
        """ValueError unless the slice starts and ends between two chunks."""
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

    @property
    def first(self) -> int:
        """The c of e = 0, counted from the first c of the slice's chunks of d."""
        return self.of_D.start - self.phase

    @property
    def phase(self) -> int:
        return self.of_d.start * self.rows % self.groups

    @property
    def cycles(self) -> range:
        """c // G, of all c of the layer, of the rows e."""
        start = self.of_d.start * self.rows // self.groups
        return range(start, start - (self.first - len(self.of_d) * self.rows) // self.groups)

    def place(self, device: torch.device) -> Tensor:
        """What the operators must know of a slice, as the sizes of a tensor without elements."""
        of_D = len(self.of_D), self.of_D.start
        return torch.empty(0, self.groups, *of_D, self.phase, device=device)


def worlds(groups: int) -> list[int]:
    """The numbers of ranks of which each can hold whole chunks."""
    return [ranks for ranks in range(1, groups + 1) if groups % ranks == 0]


def hadamard(q: int, device: torch.device) -> Tensor:
    """Sylvester's matrix (q, q): element (a, b) is -1 if a & b has an odd number of ones."""
    H = torch.ones(1, 1, device=device)
    while len(H) < q:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


class BlockMatrices(GeneratedMatrices):
    """A and B of a block description. Their zeros depend on the layer's sizes."""

    def chunks(self, shape: Shape) -> Chunks:
        return Chunks.of(self.description.groups, shape)

    def blocks(self, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
        """The signs without the zeros around them.

        Returns:
            a (rank indices, d / G) int8: a row holds the columns of A in the chunk of its index.
            b (1, rows, words) int64: the bit plane of a matrix (rows, D / G) of signs. Row e holds
                a column of B within its chunk of D; of a whole layer row c within chunk c % G.
        """
        held = self.chunks(shape)
        return self._a_blocks(shape, held, device), self._b_blocks(shape, held, device)

    def _a_blocks(self, shape: Shape, held: Chunks, device: torch.device) -> Tensor:
        seed, width = self.description.seed, shape.layer_d // held.groups
        columns = shape.first_column, shape.d
        planes = generate_planes(seed, ROLE_A, 0, 1, *columns, 1.0, device)
        signs = _ops.planes_to_dense(planes, shape.d, 1.0, torch.float32).view(-1, 1, width)
        classes = torch.arange(width, device=device) // shape.n
        a = signs * hadamard(shape.r // held.groups, device)[:, classes]
        return a.reshape(-1, width).to(torch.int8)

    def _b_blocks(self, shape: Shape, held: Chunks, device: torch.device) -> Tensor:
        height, Q = shape.layer_D // held.groups, len(held.of_D)
        rows, words = len(held.cycles) * Q, -(-height // 64)
        b = torch.empty(1, rows, words, dtype=torch.int64, device=device)
        chunks, seed = (held.of_D.start, Q), as_signed(self.description.seed)
        _ops.fill_blocks_(b, seed, height, held.groups, *chunks, held.cycles.start)
        return b

    def a_planes(self, shape: Shape, device: torch.device) -> Tensor:
        held = self.chunks(shape)
        a = self._a_blocks(shape, held, device).view(len(held.of_d), -1, shape.d // len(held.of_d))
        A = torch.zeros(held.groups, a.shape[1], *a.shape[::2], device=device)
        for h, block in enumerate(a):
            A[held.of_d[h], :, h] = block
        return _ops.pack_dense(A.view(shape.r, shape.d))[0]

    def b_planes(self, shape: Shape, device: torch.device) -> Tensor:
        held = replace(self.chunks(shape), of_d=range(self.description.groups))
        height, Q = shape.layer_D // held.groups, len(held.of_D)
        planes = self._b_blocks(shape, held, device)
        b = _ops.planes_to_dense(planes, height, 1.0, torch.float32)
        B = b.new_zeros(Q, height, shape.K)
        for s, g in enumerate(held.of_D):
            B[s, :, g :: held.groups] = b[s::Q].T
        return _ops.pack_dense(B.view(shape.D, shape.K))[0]
