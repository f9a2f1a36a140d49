"""Every operator as a call with its floor, for kernels.py."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from randlora_ext import _C, Basis
from randlora_ext.ops import hadamard, independent

from . import floors
from .floors import Floor

ops = torch.ops.randlora


@dataclass(frozen=True)
class Op:
    name: str
    tokens: int | None
    call: Callable[[], object]
    floor: Floor
    waits: bool = False  # for the card, so no graph can capture it: times include launch gaps


def that_make_bases(b: Basis, device: torch.device) -> Iterator[Op]:
    """Independent of the layer's dtype."""
    seeds = itertools.count(1)  # a new basis at every call: no cache has it
    density = None if b.kind == "hadamard" else b.density

    def from_seed() -> None:
        Basis(b.in_features, b.out_features, b.r, density, next(seeds)).packed(device)

    yield Op("basis from a seed", None, from_seed, floors.whole_basis(b), waits=True)
    if b.kind == "hadamard":
        return
    planes = torch.empty(2, b.D, -(-b.K // 64), dtype=torch.int64, device=device)
    fill = partial(ops.fill_planes_, planes, b.seed, 1, 0, 0, b.K, _C.threshold(b.density))
    fill()
    yield Op("fill_planes_", None, fill, floors.fill_planes(b))
    if b.format == "lists":
        for by_column, lines in ((False, "rows"), (True, "columns")):
            call = partial(ops.planes_to_lists, planes, b.K, by_column)
            floor = floors.planes_to_lists(b, by_column)
            yield Op(f"planes_to_lists, {lines}", None, call, floor, waits=True)
    expand = partial(ops.planes_to_dense, planes, b.K, 1.0, torch.bfloat16)
    yield Op("planes_to_dense", None, expand, floors.planes_to_dense(b))


def of_layers(
    b: Basis,
    device: torch.device,
    dtype: torch.dtype,
    tokens: list[int],
    with_weight: bool = False,
) -> Iterator[Op]:
    """What layers call, without the base layer's GEMM, which is torch's, unless `with_weight`."""
    size, element = (b.out_features, b.in_features), dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int, like: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device).to(like)

    # About as large as in a new adapter: float16 cannot hold much larger products.
    lam, gam = normal(b.r, b.n, like=wide), normal(b.n, b.d, like=wide) / b.d
    W, module = normal(*size), hadamard if b.kind == "hadamard" else independent
    bases = lam, gam, *module.basis_arguments(b, device).values()
    if b.kind == "hadamard":
        for weight in (W, None) if with_weight else (W,):
            yield Op("hadamard_weight", None, partial(ops.hadamard_weight, weight, *bases),
                     floors.hadamard_weight(b, element))  # fmt: skip
        yield Op("hadamard_weight backward", None, partial(ops.hadamard_weight_backward, W, *bases),
                 floors.hadamard_weight_backward(b, element))  # fmt: skip
    else:
        A, floor = b.dense(device, dtype)[0], floors.scaled_basis(b, element)
        yield Op("scaled_basis", None, partial(ops.scaled_basis, A, lam, gam), floor)
        backward = partial(ops.scaled_basis_backward, normal(b.K, b.d), A, lam, gam)
        yield Op("scaled_basis backward", None, backward, replace(floor, fma=2 * floor.fma))
    forward, backward = f"{b.kind}_linear", f"{b.kind}_linear_backward"
    for count in tokens:
        x, dy = normal(count, b.in_features), normal(count, b.out_features)
        if b.kind == "hadamard":
            one, two = floors.hadamard(b, count, element=element)
        else:
            one, two = floors.independent(b, count, element)
        base = W if with_weight else None
        yield Op(forward, count, partial(getattr(ops, forward), x, base, None, *bases), one)
        call = partial(getattr(ops, backward), dy, x, base, *bases, True, True)
        yield Op(f"{forward} backward", count, call, two)
