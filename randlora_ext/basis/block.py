"""Block matrices: A and B of dense blocks in G = 1 / density groups (docs/basis-spec.md)."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .generated import ROLE_A, ROLE_B, GeneratedMatrices, generate_planes
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


def hadamard(q: int, device: torch.device) -> Tensor:
    """Sylvester's matrix (q, q): element (a, b) is -1 if a & b has an odd number of ones."""
    H = torch.ones(1, 1, device=device)
    while len(H) < q:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


class BlockMatrices(GeneratedMatrices):
    """A and B of a block description. Their zeros depend on the layer's sizes."""

    def blocks(self, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
        """The signs without the zeros around them.

        Returns:
            a (r, d / G) int8: row j holds the columns of A in chunk j // (r / G).
            b (K, D / G) float32: row c holds column c of B, within chunk c % G.
        """
        return self._a_blocks(shape, device), self._b_blocks(shape, device)

    def _a_blocks(self, shape: Shape, device: torch.device) -> Tensor:
        groups = self.description.groups
        width = shape.d // groups
        planes = generate_planes(self.description.seed, ROLE_A, 0, 1, 0, shape.d, 1.0, device)
        signs = _ops.planes_to_dense(planes, shape.d, 1.0, torch.float32).view(groups, 1, width)
        classes = torch.arange(width, device=device) // shape.n
        a = signs * hadamard(shape.r // groups, device)[:, classes]
        return a.reshape(shape.r, width).to(torch.int8)

    def _b_blocks(self, shape: Shape, device: torch.device) -> Tensor:
        groups, seed = self.description.groups, self.description.seed
        height = shape.D // groups
        b = torch.empty(shape.K, height, device=device)
        for g in range(groups):
            rows = generate_planes(seed, ROLE_B, g * height, height, 0, shape.K, 1.0, device)
            b[g::groups] = _ops.planes_to_dense(rows, shape.K, 1.0, torch.float32)[:, g::groups].T
        return b

    def a_planes(self, shape: Shape, device: torch.device) -> Tensor:
        a, groups = self._a_blocks(shape, device), self.description.groups
        A = torch.zeros(groups, shape.r // groups, groups, a.shape[1], device=device)
        for h, block in enumerate(a.view(groups, -1, a.shape[1])):
            A[h, :, h] = block
        return _ops.pack_dense(A.view(shape.r, shape.d))[0]

    def b_planes(self, shape: Shape, device: torch.device) -> Tensor:
        b, groups = self._b_blocks(shape, device), self.description.groups
        B = b.new_zeros(groups, b.shape[1], shape.K)
        for g in range(groups):
            B[g, :, g::groups] = b[g::groups].T
        return _ops.pack_dense(B.view(shape.D, shape.K))[0]
