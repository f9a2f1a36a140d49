"""A basis under torch.compile and torch.export: packed while tracing, its path fixed for all T.

Imported where a trace asks for it, since torch._dynamo takes as long to load as torch.
"""

import torch
import torch._dynamo
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from .basis import TernaryBasis
from .cost import Region, path_regions
from .packing import Packed, with_index

# Dynamo runs what is marked as constant while it traces. torch 2.11 lets that be a method, found by
# its function's name, but takes no object as an argument; the token is read to be guarded on.


def packed(basis: TernaryBasis, device: torch.device, dense: torch.dtype | None = None) -> Packed:
    """What ``basis.packed`` (``basis.dense_b`` for a dtype) holds, as inputs of the graph.

    Constants of the graph would live as long as it, and no guard could tell that a model has moved.
    """
    return getattr(basis, basis._trace_pack(basis._token, device, dense))


def _trace_pack(
    basis: TernaryBasis, token: str, device: torch.device, dense: torch.dtype | None
) -> str:
    """Packs, and names the attribute under which Dynamo finds it.

    Of a dictionary Dynamo would see what was in it when it first looked.
    """
    basis.packed(device)
    if dense is None:
        name, made = f"_packed_{device}", basis._packed[with_index(device)]
    else:
        basis.dense_b(device, dense)
        name, made = f"_dense_{dense}_{device}", basis._dense[with_index(device), dense]
    for tensor in made.tensors:  # like parameters: no symbolic sizes, and CUDA graphs copy nothing
        torch._dynamo.mark_static(tensor)
        torch._dynamo.mark_static_address(tensor, guard=False)
    setattr(basis, name, made)
    return name


def _trace_regions(basis: TernaryBasis, token: str, *decided_by) -> tuple[Region, ...]:
    return path_regions(basis, *decided_by)


TernaryBasis._trace_pack = torch._dynamo.assume_constant_result(_trace_pack)
TernaryBasis._trace_regions = torch._dynamo.assume_constant_result(_trace_regions)


def choose(
    basis: TernaryBasis, tokens: int, dtype: torch.dtype, has_weight: bool, device_type: str
) -> tuple[str, str]:
    """(path, how the factored one multiplies by B), where `tokens` may be symbolic.

    torch.compile guards on the region that tokens is in, of which there are few: other sizes in it
    run the same code. An exported program must hold for every size, so that it is the factored path
    unless the declared range of T lies in one region.
    """
    decided_by = dtype, has_weight, device_type
    *regions, last = basis._trace_regions(basis._token, *decided_by)
    exporting = torch.compiler.is_exporting()
    known = statically_known_true if exporting else guard_or_false
    for region in regions:
        if known(tokens <= region.last):
            return region.path, region.b_side
        if exporting and not known(tokens > region.last):
            return "factored", last.b_side
    return last.path, last.b_side
