"""`RandLoraLinear` over a base layer that is cut by outputs or by inputs."""

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from ..nn.base_layer import is_plain_linear, matches
from ..nn.linear import RandLoraLinear
from ..ops import functional


class TensorParallelRandLoraLinear(RandLoraLinear):
    """What `RandLoraColwise` and `RandLoraRowwise` make of a `RandLoraLinear`, in place.

    ``forward`` is still ``base_layer(x) + scaling * x dW^T``, on DTensors: x replicated and y
    Shard(-1) where the outputs are cut, x Shard(-1) and y Partial where the inputs are. The rank
    holds its part of W and generates its own slice of the bases (`TernaryBasis.slice`); no basis is
    ever communicated. Every parameter is a DTensor of the whole layer's shape:

        what is cut     B          A             lambda       gamma        summed in backward
        the D side      its rows   whole         Replicate    Replicate    dlam and dgam
        the d side      whole      its columns   Replicate    Shard(1)     dlam

    The sum is one all-reduce of a layer and backward pass. What `update_layer` adds later is cut
    the same way. `get_delta_weight` gives a DTensor, `get_scaled_bases` this rank's slices.
    """

    device_mesh: DeviceMesh
    cut_outputs: bool
    src_data_rank: int | None

    def update_layer(self, adapter_name: str, *args, **kwargs) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        self._cut_adapter(adapter_name)

    update_layer.__doc__ = RandLoraLinear.update_layer.__doc__

    def _cut_adapter(self, name: str) -> None:
        size = self.out_features if self.cut_outputs else self.in_features
        share = size // self.device_mesh.size()
        first = share * self.device_mesh.get_local_rank()
        cut = "outputs" if self.cut_outputs else "inputs"
        basis = self.bases[name].slice(**{cut: range(first, first + share)})
        for diagonals, placement in (
            (self.randlora_lambda, Replicate()),
            (self.randlora_gamma, Shard(1) if basis.d < self._d else Replicate()),
        ):
            parameter = diagonals[name]
            diagonals[name] = nn.Parameter(
                distribute_tensor(
                    parameter.detach(),
                    self.device_mesh,
                    [placement],
                    src_data_rank=self.src_data_rank,
                ),
                requires_grad=parameter.requires_grad,
            )
        self.bases[name] = basis

    @property
    def _d(self) -> int:
        return min(self.in_features, self.out_features)

    # ---- the computation ---------------------------------------------------------------------

    def _can_fuse(self, x: DTensor) -> bool:
        base = self.base_layer
        if not is_plain_linear(base) or not matches(base.weight, x):
            return False
        # A bias beside cut inputs would be added by one rank, which must not train it alone.
        return self.cut_outputs or base.bias is None or not base.bias.requires_grad

    def _part(self, name: str, x: DTensor, weight: DTensor | None, bias: DTensor | None) -> DTensor:
        lam, gam = self._diagonals(name)
        if weight is not None:
            weight = weight.to_local()
        if bias is not None:
            first = self.cut_outputs or self.device_mesh.get_local_rank() == 0
            bias = bias.to_local() if first else None
        # dx of this rank is what its outputs contribute; the sum is that of the base layer too.
        x = x.to_local(grad_placements=[Partial()] if self.cut_outputs else [Shard(x.ndim - 1)])
        y = functional.linear(x, weight, bias, self.bases[name], lam, gam, self.scaling[name])
        placement = Shard(y.ndim - 1) if self.cut_outputs else Partial()
        return DTensor.from_local(y, self.device_mesh, [placement], run_check=False)

    def _delta(self, name: str, dtype: torch.dtype) -> DTensor:
        delta = super()._delta(name, dtype)
        placement = Shard(0) if self.cut_outputs else Shard(1)
        return DTensor.from_local(delta, self.device_mesh, [placement], run_check=False)

    def _diagonals(self, name: str) -> tuple[Tensor, Tensor]:
        """This rank's lambda and gamma; in backward the gradients of replicated ones are summed."""
        lam, gam = self.randlora_lambda[name], self.randlora_gamma[name]
        if lam.device_mesh.ndim > 1:
            raise RuntimeError(
                "lambda and gamma are sharded by FSDP too; call unshard() on the module first"
            )
        group = self.device_mesh.get_group()
        if gam.placements[0].is_replicate():
            return _SumGradients.apply(group, lam.to_local(), gam.to_local())
        return *_SumGradients.apply(group, lam.to_local()), gam.to_local()

    def _weight_rounded(self, names: list[str], seed: int) -> Tensor:
        raise ValueError(
            f"rounding_seed must be None on a tensor-parallel layer, got {seed}: the random words "
            "belong to elements of the whole weight"
        )


class _SumGradients(torch.autograd.Function):
    """The tensors themselves; in backward the gradients of all, summed over ranks in one go."""

    @staticmethod
    def forward(ctx, group: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        wanted = [g for g, need in zip(gradients, ctx.needs_input_grad[1:], strict=True) if need]
        flat = torch.cat([g.flatten() for g in wanted])
        flat = funcol.wait_tensor(funcol.all_reduce(flat, "sum", ctx.group))
        sums = iter(flat.split([g.numel() for g in wanted]))
        return None, *(
            next(sums).view_as(g).to(g.dtype) if need else None
            for g, need in zip(gradients, ctx.needs_input_grad[1:], strict=True)
        )
