"""Parallel styles for `RandLoraLinear`, like torch's for nn.Linear."""

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
from ..ranks import failing_together, is_dtensor, same_on_all_ranks
from .layer import TensorParallelRandLoraLinear, check_divisible, slice_of_rank


class _RandLoraStyle(ParallelStyle):
    shards_outputs: bool
    input_layout: Placement  # needed by forward; also the default layout of incoming x
    output_layout: Placement  # the default layout of y

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
        _check_mesh(device_mesh)
        with failing_together(device_mesh):
            self._check_module(module, device_mesh)
            same_on_all_ranks(device_mesh, _decided(module))  # sums would mix two bases
        base = module.base_layer
        for name, parameter, placement in self._parameters_and_placements(base):
            sharded = distribute_tensor(
                parameter.detach(), device_mesh, [placement], src_data_rank=self.src_data_rank
            )
            setattr(base, name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        return self._convert(module, device_mesh, self.src_data_rank)

    def from_shard(
        self, shard: nn.Linear, device_mesh: DeviceMesh, **layer_options
    ) -> TensorParallelRandLoraLinear:
        """Makes an adapted layer from this rank's part of a linear layer.

        The layer shares the shard's memory; the shard itself stays as it is. The ranks compare the
        options and send nothing else.

        Args:
            shard: an nn.Linear that holds this rank's rows of the weight and of the bias
                (`RandLoraColwise`), or its columns of the weight and the whole bias
                (`RandLoraRowwise`). Shards are of equal size and in the order of ranks.
            device_mesh: a mesh of one dimension.
            layer_options: options of `RandLoraLinear`.

        Returns:
            The sharded layer.

        Raises:
            TypeError, ValueError: as the style and `RandLoraLinear` raise them.
        """
        _check_mesh(device_mesh)
        with failing_together(device_mesh):
            if type(shard) is not nn.Linear:
                raise TypeError(f"shard must be an nn.Linear, got {type(shard).__name__}")
            same_on_all_ranks(device_mesh, layer_options)
        inputs, outputs, ranks = shard.in_features, shard.out_features, device_mesh.size()
        sizes = (inputs, outputs * ranks) if self.shards_outputs else (inputs * ranks, outputs)
        base = nn.Linear(*sizes, bias=shard.bias is not None, device="meta")
        for name, local, placement in self._parameters_and_placements(shard):
            whole = DTensor.from_local(local.detach(), device_mesh, [placement], run_check=False)
            setattr(base, name, nn.Parameter(whole))
        layer = RandLoraLinear(base, **layer_options)
        return self._convert(layer.train(shard.training), device_mesh, None)  # equal on all ranks

    def _parameters_and_placements(
        self, linear: nn.Linear
    ) -> Iterator[tuple[str, Tensor, Placement]]:
        yield "weight", linear.weight, Shard(0) if self.shards_outputs else Shard(1)
        if linear.bias is not None:
            yield "bias", linear.bias, Shard(0) if self.shards_outputs else Replicate()

    def _convert(
        self, layer: Any, device_mesh: DeviceMesh, src_data_rank: int | None
    ) -> TensorParallelRandLoraLinear:
        layer.__class__ = TensorParallelRandLoraLinear
        layer.device_mesh, layer.shards_outputs = device_mesh, self.shards_outputs
        layer.src_data_rank = src_data_rank
        for name in list(layer.bases):
            layer._shard_adapter(name)
        return distribute_module(
            layer,
            device_mesh,
            input_fn=partial(_prepare_input, self.input_layouts, self.input_layout),
            output_fn=partial(_prepare_output, self.output_layouts, self.use_local_output),
        )

    def _check_module(self, module: nn.Module, device_mesh: DeviceMesh) -> None:
        style = type(self).__name__
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
        sizes = module.in_features, module.out_features
        check_divisible(style, sizes, self.shards_outputs, device_mesh.size())
        for basis in module.bases.values():
            slice_of_rank(basis, device_mesh, self.shards_outputs)


class RandLoraColwise(_RandLoraStyle):
    """Shards a `RandLoraLinear` by outputs: W and its bias Shard(0), x whole, y Shard(-1).

    Like ``torch.distributed.tensor.parallel.ColwiseParallel``, with the same arguments, for a layer
    with adapters. Forward communicates only if ``input_layouts`` needs it. Backward has one
    all-reduce for dx, which a frozen layer has too, and one for lambda and gamma.

    Args:
        input_layouts: placement of incoming x; Shard(1) (sequence parallel) is gathered.
        output_layouts: placement of y.
        use_local_output: return y as a plain tensor instead of a DTensor.

    Raises:
        TypeError: the module is not a RandLoraLinear over an nn.Linear without hooks.
        ValueError: out_features is not divisible by the number of ranks, an adapter is merged or
            differs over ranks, or the mesh has more than one dimension. After an error nothing has
            changed.
    """

    shards_outputs, input_layout, output_layout = True, Replicate(), Shard(-1)


class RandLoraRowwise(_RandLoraStyle):
    """Shards a `RandLoraLinear` by inputs: W Shard(1), bias whole, x Shard(-1), y summed.

    Like ``torch.distributed.tensor.parallel.RowwiseParallel``, with the same arguments, for a layer
    with adapters. The base layer's and the adapter's parts of y are summed together, by the one
    all-reduce (reduce-scatter if ``output_layouts=Shard(1)``) that a frozen layer has too. Backward
    has one all-reduce for lambda's gradient, and for gamma's if the d side is not sharded.

    Args:
        input_layouts: placement of incoming x.
        output_layouts: placement of y.
        use_local_output: return y as a plain tensor instead of a DTensor.

    Raises:
        TypeError, ValueError: as `RandLoraColwise`, for in_features.
    """

    shards_outputs, input_layout, output_layout = False, Shard(-1), Replicate()


def _check_mesh(device_mesh: DeviceMesh) -> None:
    if device_mesh.ndim != 1:
        raise ValueError(
            f"device_mesh must have one dimension, got {device_mesh.ndim}; pass mesh['tp'], say"
        )


def _decided(layer: RandLoraLinear) -> dict[str, Any]:
    """What must be equal on all ranks, by the words of an error message."""
    values: dict[str, Any] = {"the names of adapters": [*layer.bases]}
    for name, basis in layer.bases.items():
        own = {
            "basis": basis.kind,
            "projection_prng_key": basis.seed,
            "density": basis.density,
            "r": basis.r,
            "randlora_alpha / r": layer.scaling[name],
            "randlora_dropout": getattr(layer.randlora_dropout[name], "p", 0.0),
        }
        values |= {f"{option} of adapter {name!r}": value for option, value in own.items()}
    return values


def _prepare_input(given: Placement, needed: Placement, module, inputs, device_mesh) -> DTensor:
    x = inputs[0]
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, device_mesh, [given], run_check=False)
    return _redistributed(x, needed)


def _prepare_output(layout: Placement, local: bool, module, y: DTensor, device_mesh) -> Tensor:
    y = _redistributed(y, layout)
    return y.to_local() if local else y


def _redistributed(t: DTensor, placement: Placement) -> DTensor:
    # If t has the placement already, leave it: redistributing would reduce its gradient before
    # other users of t have added to it.
    if isinstance(placement, Shard) and placement.dim < 0:
        placement = Shard(placement.dim + t.ndim)
    return t if t.placements == (placement,) else t.redistribute(placements=[placement])
