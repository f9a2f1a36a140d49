"""Parallel styles of `RandLoraLinear`, as torch has them of nn.Linear."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from ..nn.base_layer import is_plain_linear
from ..nn.linear import RandLoraLinear
from ..ops.dtensor import is_dtensor
from .layer import TensorParallelRandLoraLinear


class _RandLoraStyle(ParallelStyle):
    cut_outputs: bool
    input_layout: Placement  # in which forward needs x, and by default gets it
    output_layout: Placement  # in which y leaves by default

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts or self.input_layout
        self.output_layouts = output_layouts or self.output_layout
        self.use_local_output = use_local_output

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        self._check(module, device_mesh)
        base = module.base_layer
        for name, whole, placement in self._parts(base):
            cut = distribute_tensor(
                whole.detach(), device_mesh, [placement], src_data_rank=self.src_data_rank
            )
            setattr(base, name, nn.Parameter(cut, requires_grad=whole.requires_grad))
        return self._take(module, device_mesh, self.src_data_rank)

    def from_shard(
        self, shard: nn.Linear, device_mesh: DeviceMesh, **layer_options
    ) -> TensorParallelRandLoraLinear:
        """An adapted layer over this rank's part of a linear layer, without communication.

        Args:
            shard: an nn.Linear that holds this rank's rows of the weight and of the bias
                (`RandLoraColwise`), or its columns of the weight and the whole bias
                (`RandLoraRowwise`). Parts are equally large and lie in the order of ranks.
            device_mesh: of one dimension.
            layer_options: of `RandLoraLinear`.

        The shard's memory is shared, not copied, and the shard itself left as it is. Raises as the
        style does, and as RandLoraLinear.
        """
        if type(shard) is not nn.Linear:
            raise TypeError(f"shard must be an nn.Linear, got {type(shard).__name__}")
        _check_mesh(device_mesh)
        inputs, outputs, ranks = shard.in_features, shard.out_features, device_mesh.size()
        sizes = (inputs, outputs * ranks) if self.cut_outputs else (inputs * ranks, outputs)
        base = nn.Linear(*sizes, bias=shard.bias is not None, device="meta")
        for name, local, placement in self._parts(shard):
            whole = DTensor.from_local(local.detach(), device_mesh, [placement], run_check=False)
            setattr(base, name, nn.Parameter(whole))
        layer = RandLoraLinear(base, **layer_options)
        return self._take(layer.train(shard.training), device_mesh, None)  # equal on all ranks

    def _parts(self, linear: nn.Linear) -> Iterator[tuple[str, Tensor, Placement]]:
        yield "weight", linear.weight, Shard(0) if self.cut_outputs else Shard(1)
        if linear.bias is not None:
            yield "bias", linear.bias, Shard(0) if self.cut_outputs else Replicate()

    def _take(
        self, layer: Any, device_mesh: DeviceMesh, src_data_rank: int | None
    ) -> TensorParallelRandLoraLinear:
        layer.__class__ = TensorParallelRandLoraLinear
        layer.device_mesh, layer.cut_outputs = device_mesh, self.cut_outputs
        layer.src_data_rank = src_data_rank
        for name in list(layer.bases):
            layer._cut_adapter(name)
        return distribute_module(
            layer,
            device_mesh,
            input_fn=partial(_prepare_input, self.input_layouts, self.input_layout),
            output_fn=partial(_prepare_output, self.output_layouts, self.use_local_output),
        )

    def _check(self, module: nn.Module, device_mesh: DeviceMesh) -> None:
        style = type(self).__name__
        _check_mesh(device_mesh)
        if type(module) is not RandLoraLinear:
            raise TypeError(f"{style} serves RandLoraLinear, got {type(module).__name__}")
        if not is_plain_linear(module.base_layer):
            raise TypeError(
                f"{style} serves base layers that are nn.Linear themselves, without hooks, got "
                f"{type(module.base_layer).__name__}; apply the style to the RandLoraLinear alone, "
                "it shards the base layer too"
            )
        if is_dtensor(module.base_layer.weight):
            raise TypeError(
                f"{style}: the base layer is sharded already; parallelize before fully_shard"
            )
        if module.merged:
            raise ValueError(
                f"{style}: adapters {module.merged_adapters} are merged; unmerge() first"
            )
        name = "out_features" if self.cut_outputs else "in_features"
        if (size := getattr(module, name)) % device_mesh.size():
            raise ValueError(
                f"{style}: {name} must be divisible by the {device_mesh.size()} ranks of the mesh, "
                f"got {size}"
            )


class RandLoraColwise(_RandLoraStyle):
    """Cuts a `RandLoraLinear` by outputs: W and its bias Shard(0), x whole, y Shard(-1).

    As ``torch.distributed.tensor.parallel.ColwiseParallel``, whose arguments these are, but for a
    layer with adapters. Forward communicates nothing, but what ``input_layouts`` asks for. Backward
    has one all-reduce for dx, which a frozen layer has too, and one for lambda's and gamma's.

    Args:
        input_layouts: how x arrives; Shard(1) (sequence parallel) is gathered.
        output_layouts: how y is to leave.
        use_local_output: y as a plain tensor, or as a DTensor.

    Raises:
        TypeError: on another module than RandLoraLinear over an nn.Linear without hooks.
        ValueError: where out_features is not divisible by the number of ranks, an adapter is
            merged, or the mesh has more than one dimension. Nothing has changed then.
    """

    cut_outputs, input_layout, output_layout = True, Replicate(), Shard(-1)


class RandLoraRowwise(_RandLoraStyle):
    """Cuts a `RandLoraLinear` by inputs: W Shard(1), bias whole, x Shard(-1), y summed.

    As ``torch.distributed.tensor.parallel.RowwiseParallel``, whose arguments these are, but for a
    layer with adapters. The base layer's and the adapter's part of y are summed over ranks
    together, by the one all-reduce (or, for ``output_layouts=Shard(1)``, reduce-scatter) that a
    frozen layer has too; backward has one all-reduce for lambda's gradient, and gamma's where d is
    not cut.

    Args:
        input_layouts: how x arrives.
        output_layouts: how y is to leave.
        use_local_output: y as a plain tensor, or as a DTensor.

    Raises:
        TypeError, ValueError: as `RandLoraColwise`, for in_features.
    """

    cut_outputs, input_layout, output_layout = False, Shard(-1), Replicate()


def _check_mesh(device_mesh: DeviceMesh) -> None:
    if device_mesh.ndim != 1:
        raise ValueError(
            f"device_mesh must have one dimension, got {device_mesh.ndim}; pass mesh['tp'], say"
        )


def _prepare_input(arrives: Placement, wanted: Placement, module, inputs, device_mesh) -> DTensor:
    x = inputs[0]
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, device_mesh, [arrives], run_check=False)
    return _placed(x, wanted)


def _placed(t: DTensor, placement: Placement) -> DTensor:
    # Not where it lies so already: backward would reduce a gradient that others may still add to.
    if isinstance(placement, Shard) and placement.dim < 0:
        placement = Shard(placement.dim + t.ndim)
    return t if t.placements == (placement,) else t.redistribute(placements=[placement])


def _prepare_output(leaves: Placement, local: bool, module, y: DTensor, device_mesh) -> Tensor:
    y = _placed(y, leaves)
    return y.to_local() if local else y
