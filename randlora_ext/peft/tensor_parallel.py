"""PEFT's layers over linear layers that transformers' ``tp_plan`` has sharded."""

from dataclasses import fields
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..basis import TernaryBasis
from ..distributed.layer import ShardedLayer, SumGradients, check_divisible, slice_of_rank
from ..nn.state_dict import DIAGONALS
from ..ranks import is_dtensor, same_on_all_ranks
from .layer import AcceleratedLinear

try:
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
except ImportError as error:
    raise ImportError(
        "adapters of a model that transformers has sharded need transformers 5.17 or newer"
    ) from error

# In these styles x and y are whole on every rank, so the adapter need not be cut.
_WHOLE = ("colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep", "replicate")


class TensorParallelLinear(ShardedLayer, AcceleratedLinear):
    """`AcceleratedLinear` over an nn.Linear that is split over the ranks.

    x and y are plain tensors, as in the base layer: under "colwise" x is whole and y has this
    rank's outputs, under "rowwise" x has this rank's inputs and y is whole. Each rank makes its own
    slice of the bases. Lambda and gamma are ordinary parameters, whole and equal on all ranks,
    because backward sums their gradients. `get_delta_weight` returns a DTensor.
    """

    slices: dict[str, tuple[TernaryBasis, TernaryBasis]]  # (whole, slice) by adapter
    other_param_names = (*AcceleratedLinear.other_param_names, "slices")  # deleted with it

    def basis_of(self, adapter: str, device: torch.device) -> TernaryBasis:
        """This rank's slice."""
        basis = super().basis_of(adapter, device)
        if adapter not in self.slices or self.slices[adapter][0] is not basis:
            part = slice_of_rank(basis, self.device_mesh, self.shards_outputs)
            self.slices[adapter] = basis, part
        return self.slices[adapter][1]

    def _diagonals(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """This rank's lambda and gamma; backward sums their gradients over all ranks."""
        group = self.device_mesh.get_group()
        lam, gam = SumGradients.apply(group, *super()._diagonals(name, device))
        if self.shards_outputs == (self.in_features > self.out_features):  # d is cut
            rank, ranks = self.device_mesh.get_local_rank(), self.device_mesh.size()
            gam = gam.chunk(ranks, dim=1)[rank].contiguous()
        return lam, gam

    def _part(self, name: str, x: Tensor, weight: Any = None, bias: Any = None) -> Tensor:
        placement = Replicate() if self.shards_outputs else Shard(x.ndim - 1)
        placed = DTensor.from_local(x, self.device_mesh, [placement], run_check=False)
        y: Any = super()._part(name, placed, weight, bias)
        return y.to_local() if self.shards_outputs else y.full_tensor()


def plan_of(model: nn.Module, name: str) -> tuple[str, DeviceMesh] | None:
    """(style, mesh) by which transformers, since 5.17, has sharded a module; None if it has not."""
    mesh = getattr(model, "_device_mesh", None)
    style = (getattr(model, "tp_plan", None) or {}).get(replace_layer_number_by_wildcard(name))
    if mesh is None or style is None or style in _WHOLE:
        return None
    if mesh.ndim > 1:  # pipeline, data and tensor parallel
        if "tp" not in (mesh.mesh_dim_names or ()):
            return None
        mesh = mesh["tp"]
    return (style, mesh) if mesh.size() > 1 else None


def check_ranks(model: Any, config: peft.RandLoraConfig) -> None:
    """Raises ValueError on every rank if their configurations differ: sums would mix two bases."""
    general = {field.name for field in fields(peft.PeftConfig)}  # such as a local path
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in general}
    own |= {name: sorted(value) for name, value in own.items() if isinstance(value, set)}
    same_on_all_ranks(model._device_mesh, own)


def check_plans(model: nn.Module, sizes: dict[str, tuple[int, int]]) -> None:
    """Raises TypeError or ValueError if a target cannot be served as it is sharded.

    Args:
        sizes: in_features and out_features by the target's name.
    """
    for name, features in sizes.items():
        if (plan := plan_of(model, name)) is None:
            continue
        style, mesh = plan
        whole_mesh: Any = model._device_mesh
        if mesh.size() != whole_mesh.size():
            raise ValueError(
                "tensor parallelism by transformers must be the only parallelism of the model, "
                "because nothing would sum the adapters' gradients over the other dimensions of "
                f"its mesh, got {whole_mesh}"
            )
        layer = model.get_submodule(name)
        base = getattr(layer, "base_layer", layer)
        if type(base) is not nn.Linear or not is_dtensor(base.weight):
            raise TypeError(
                f"target {name!r} must be an nn.Linear whose weight is a DTensor (transformers "
                f"5.17 or newer), got {type(base).__name__} with {type(base.weight).__name__}"
            )
        if style not in ("colwise", "rowwise"):
            raise ValueError(
                f"target {name!r} is sharded by the tensor parallel style {style!r}; an adapter "
                f"needs 'colwise', 'rowwise' or one of {', '.join(map(repr, _WHOLE))}"
            )
        check_divisible(f"target {name!r}", features, style == "colwise", mesh.size())


def shard(layer: AcceleratedLinear, model: nn.Module, name: str, adapter: str) -> None:
    """Makes layer `name` follow the sharding of its base layer, in place, with a new adapter."""
    if (plan := plan_of(model, name)) is None:
        return
    if type(layer) is AcceleratedLinear:
        style, mesh = plan
        layer.__class__ = TensorParallelLinear
        layer.device_mesh, layer.shards_outputs, layer.slices = mesh, style == "colwise", {}
    for name in DIAGONALS:
        parameter = getattr(layer, name)[adapter]
        if not parameter.is_meta:  # init_weights=False draws lambda on each rank
            dist.broadcast(parameter.data, group=layer.device_mesh.get_group(), group_src=0)
    layer.basis_of(adapter, layer.base_layer.weight.device)  # torch.compile cannot slice
