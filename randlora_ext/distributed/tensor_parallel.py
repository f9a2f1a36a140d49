"""`RandLoraLinear` sharded by outputs or by inputs, and the styles that shard it, like torch's."""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from ..basis import TernaryBasis
from ..nn.adapted_layer import AdaptedLayer
from ..nn.base_layer import has_hooks, is_plain_linear, matches
from ..nn.linear import RandLoraLinear
from ..ops.dtensor import is_dtensor
from .agreement import same_on_all_ranks


def slice_of_rank(basis: TernaryBasis, mesh: DeviceMesh, shards_outputs: bool) -> TernaryBasis:
    """This rank's equal part of the outputs or inputs."""
    share = (basis.out_features if shards_outputs else basis.in_features) // mesh.size()
    first = share * mesh.get_local_rank()
    return basis.slice(**{"outputs" if shards_outputs else "inputs": range(first, first + share)})


def check_divisible(argument: str, sizes: tuple[int, int], shards_outputs: bool, n: int) -> None:
    """Raises ValueError, naming `argument`, unless `n` ranks can each hold an equal part.

    Args:
        sizes: in_features and out_features.
    """
    side = "out_features" if shards_outputs else "in_features"
    if (size := sizes[shards_outputs]) % n:
        raise ValueError(
            f"{argument}: {side} must be divisible by the {n} ranks of the mesh, got {size}"
        )


class ShardedLayer(AdaptedLayer):
    """A layer whose base and adapters hold this rank's part of the inputs or of the outputs.

    Mixed in before the class of the whole layer. Parts of dx and, if inputs are cut, of y are
    `Partial`: their sums join those that the base layer needs anyway.
    """

    device_mesh: DeviceMesh
    shards_outputs: bool

    def _part(self, name: str, x: Any, weight: Any = None, bias: Any = None) -> Tensor:
        last = Shard(x.ndim - 1)
        if bias is not None:
            adds_bias = self.shards_outputs or self.device_mesh.get_local_rank() == 0
            bias = bias.to_local() if adds_bias else None
        weight = None if weight is None else weight.to_local()
        x = x.to_local(grad_placements=[Partial()] if self.shards_outputs else [last])
        y = super()._part(name, x, weight, bias)
        placement = last if self.shards_outputs else Partial()
        return DTensor.from_local(y, self.device_mesh, [placement], run_check=False)

    def _can_fuse(self, name: str, x: Tensor) -> bool:
        base = self.base_layer
        # If inputs are cut, only one rank adds the bias; the others would not see its gradient.
        frozen = self.shards_outputs or base.bias is None or not base.bias.requires_grad
        return frozen and not has_hooks(base) and matches(base.weight, x)

    def _laid_out(self, delta: Tensor) -> DTensor:
        placement = Shard(0) if self.shards_outputs else Shard(1)
        return DTensor.from_local(delta, self.device_mesh, [placement], run_check=False)


class TensorParallelRandLoraLinear(ShardedLayer, RandLoraLinear):
    """A `RandLoraLinear` that `RandLoraColwise` or `RandLoraRowwise` has sharded, in place.

    ``forward`` is still ``base_layer(x) + scaling * x dW^T``, on DTensors. If outputs are sharded,
    x is replicated and y Shard(-1); if inputs are, x is Shard(-1) and y Partial. Each rank holds
    its part of W and generates its own slice of the bases (`TernaryBasis.slice`); no basis is ever
    sent. Every parameter is a DTensor of the whole layer's shape:

        sharded         B          A             lambda       gamma        summed in backward
        the D side      its rows   whole         Replicate    Replicate    dlam and dgam
        the d side      whole      its columns   Replicate    Shard(1)     dlam

    The sum is one all-reduce per layer and backward pass. Adapters that `update_layer` adds later
    are sharded too. `get_delta_weight` returns a DTensor, `get_scaled_bases` this rank's slices.
    """

    src_data_rank: int | None

    def update_layer(self, adapter_name: str, *args, **kwargs) -> None:
        call = inspect.signature(super().update_layer).bind(adapter_name, *args, **kwargs)
        call.apply_defaults()
        same_on_all_ranks(self.device_mesh, call.arguments)
        super().update_layer(adapter_name, *args, **kwargs)
        self._shard_adapter(adapter_name)

    update_layer.__doc__ = RandLoraLinear.update_layer.__doc__

    def _new_basis(self, r: int, density: float | None, seed: int, kind: str) -> TernaryBasis:
        basis = super()._new_basis(r, density=density, seed=seed, kind=kind)
        slice_of_rank(basis, self.device_mesh, self.shards_outputs)  # before anything changes
        return basis

    def _shard_adapter(self, name: str) -> None:
        basis = slice_of_rank(self.bases[name], self.device_mesh, self.shards_outputs)
        d_is_cut = basis.d < self.bases[name].d
        for diagonals, placement in (
            (self.randlora_lambda, Replicate()),
            (self.randlora_gamma, Shard(1) if d_is_cut else Replicate()),
        ):
            parameter = diagonals[name]
            made = distribute_tensor(
                parameter.detach(), self.device_mesh, [placement], src_data_rank=self.src_data_rank
            )
            diagonals[name] = nn.Parameter(made, requires_grad=parameter.requires_grad)
        self.bases[name] = basis

    def _can_fuse(self, name: str, x: DTensor) -> bool:
        return is_plain_linear(self.base_layer) and super()._can_fuse(name, x)

    def _diagonals(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """This rank's lambda and gamma; backward sums the gradients of replicated ones."""
        lam, gam = self.randlora_lambda[name], self.randlora_gamma[name]
        if lam.device_mesh.ndim > 1:
            raise RuntimeError(
                "lambda and gamma are sharded by FSDP too; call unshard() on the module first"
            )
        group = self.device_mesh.get_group()
        if gam.placements[0].is_replicate():
            return SumGradients.apply(group, lam.to_local(), gam.to_local())
        return *SumGradients.apply(group, lam.to_local()), gam.to_local()

    def _weight_rounded(self, weight: Tensor, names: list[str], seed: int) -> Tensor:
        raise ValueError(
            f"rounding_seed must be None on a tensor-parallel layer, got {seed}: the random words "
            "belong to elements of the whole weight"
        )


class SumGradients(torch.autograd.Function):
    """Identity; backward sums the gradients of all tensors over ranks, in one all-reduce."""

    @staticmethod
    def forward(ctx, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        wanted = [g for g, need in zip(gradients, ctx.needs_input_grad[1:], strict=True) if need]
        flat = torch.cat([g.flatten() for g in wanted])
        dist.all_reduce(flat, group=ctx.group)
        sums = iter(flat.split([g.numel() for g in wanted]))
        return None, *(
            next(sums).view_as(g).to(g.dtype) if need else None
            for g, need in zip(gradients, ctx.needs_input_grad[1:], strict=True)
        )


# ---- styles --------------------------------------------------------------------------------------


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
        if type(shard) is not nn.Linear:
            raise TypeError(f"shard must be an nn.Linear, got {type(shard).__name__}")
        _check_mesh(device_mesh)
        inputs, outputs, ranks = shard.in_features, shard.out_features, device_mesh.size()
        sizes = (inputs, outputs * ranks) if self.shards_outputs else (inputs * ranks, outputs)
        base = nn.Linear(*sizes, bias=shard.bias is not None, device="meta")
        for name, local, placement in self._parameters_and_placements(shard):
            whole = DTensor.from_local(local.detach(), device_mesh, [placement], run_check=False)
            setattr(base, name, nn.Parameter(whole))
        same_on_all_ranks(device_mesh, layer_options)
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
