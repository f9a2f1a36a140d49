"""`RandLoraLinear` over a base layer that is sharded by outputs or by inputs."""

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from ..basis import TernaryBasis
from ..nn.adapted_layer import AdaptedLayer
from ..nn.base_layer import has_hooks, is_plain_linear, matches
from ..nn.linear import RandLoraLinear
from ..ranks import same_on_all_ranks


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
