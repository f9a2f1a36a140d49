"""Block matrices: A and B of dense blocks in G = 1 / density groups (docs/basis-spec.md)."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .. import kernels
from .chunks import Chunks
from .description import as_signed
from .generated import ROLE_A, GeneratedMatrices, generate_planes
from .shape import Shape
from .ternary_matrices import Packed

_ops = torch.ops.randlora


def fits(groups: int, in_features: int, out_features: int, r: int) -> bool:
    """Whether these sizes allow blocks that force no element of dW to zero (G^2 <= K)."""
    K = Shape.of(in_features, out_features, r).K  # raises if a size is invalid
    q = r // groups
    divides = all(size % groups == 0 for size in (in_features, out_features, r))
    return divides and q & (q - 1) == 0 and groups * groups <= K


def check_sizes(groups: int, in_features: int, out_features: int, r: int) -> None:
    """Raises ValueError, naming the densities that fit, unless 1 / groups does."""
    if not fits(groups, in_features, out_features, r):
        possible = _densities([(in_features, out_features)], r)
        instead = (
            f"densities that fit: {possible}"
            if possible
            else "no density fits; take another r, or basis='independent'"
        )
        raise ValueError(f"{_needs(groups, in_features, out_features, r)}; {instead}")


def check_layers(groups: int, layers: Mapping[str, tuple[int, int]], r: int) -> None:
    """`check_sizes` for all layers of a model: (in_features, out_features) by name.

    Raises ValueError that names the first layer that does not fit and the densities that fit all.
    """
    misfits = [name for name, sizes in layers.items() if not fits(groups, *sizes, r)]
    if misfits:
        name, possible = misfits[0], _densities(layers.values(), r)
        fit = f"densities that fit all {len(layers)} targeted layers: {possible}. Take one of them,"
        none = f"no density fits all {len(layers)} targeted layers. Take"
        raise ValueError(
            f"layer {name!r} does not fit: {_needs(groups, *layers[name], r)}; "
            f"{fit if possible else none} another r, or leave that layer out of target_modules"
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


def hadamard(q: int, device: torch.device) -> Tensor:
    """Sylvester's matrix (q, q): element (a, b) is -1 if a & b has an odd number of ones."""
    H = torch.ones(1, 1, device=device)
    while len(H) < q:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


class BlockMatrices(GeneratedMatrices):
    """A and B of a block description. Their zeros depend on the layer's sizes."""

    def check(self, shape: Shape) -> None:
        if shape.is_slice:
            self.chunks(shape)
        else:
            check_sizes(self.description.groups, shape.in_features, shape.out_features, shape.r)

    def chunks(self, shape: Shape) -> Chunks:
        return Chunks.of(self.description.groups, shape)

    def format(self, shape: Shape) -> str:
        return "blocks"

    def pack(self, shape: Shape, on: torch.device, name: str) -> list[Tensor]:
        """The signs without the zeros around them.

        a (rank indices, d / G) int8: row j is row j of A, cut to the chunk of d where it is not 0.
        b (1, rows, words) int64: the bit plane of a matrix (rows, D / G) of signs. Row e is one
            column of B, cut to its chunk of D; in a whole layer, row c is column c.
        place: for a slice only, the tensor of `Chunks.place`.
        """
        held = self.chunks(shape)
        place = [held.place(on)] if shape.is_slice else []
        return [self._a_blocks(shape, held, on), self._b_blocks(shape, held, on), *place]

    def dense_a(self, shape: Shape, on: torch.device, dtype: torch.dtype, packed: Packed) -> Tensor:
        if not kernels.serve(on.type):
            return self.dense_a(shape, torch.device("cpu"), dtype, packed).to(on)
        return _ops.planes_to_dense(self.a_planes(shape, on), shape.d, self.a_value, dtype)

    def dense_b(self, shape: Shape, on: torch.device, dtype: torch.dtype, packed: Packed) -> Tensor:
        height = shape.layer_D // self.description.groups
        return _ops.planes_to_dense(packed(on)[1], height, 1.0, dtype)

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
