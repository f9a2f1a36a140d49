"""Merging adapters into the frozen weight of `RandLoraLinear`, and unmerging them."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.dtensor import full_tensor, laid_out_like
from ..ops.functional import merged_weight


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lambda, gamma and dW beside a weight of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def complete(write: Callable[[], None]) -> None:
    """Calls `write`, and again if Ctrl-C comes between two of its lines; it must allow that."""
    try:
        write()
    except BaseException:
        write()
        raise


_Layer: Any = object  # mypy: this is mixed into RandLoraLinear


class Mergeable(_Layer):
    """The methods of `RandLoraLinear` that write to the base layer's weight."""

    merged_adapters: list[str]
    _original_weight: Tensor | None

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @torch.no_grad()
    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: str | Sequence[str] | None = None,
        keep_original: bool = False,
        rounding_seed: int | None = None,
    ) -> None:
        """Adds the adapters' weight changes to the base weight, in place.

        dW is computed in float32 (float64 for a float64 base). W + dW is computed in a wider dtype
        than W and rounded once. A 16-bit W loses changes below half an ulp.

        Args:
            safe_merge: raise instead of writing NaN or inf.
            adapter_names: the adapters to merge; None means the active ones.
            keep_original: keep a copy of W in CPU memory, so that `unmerge` restores every bit.
            rounding_seed: round a 16-bit W stochastically with this seed, so that changes below
                half an ulp count on average (`randlora_ext.merged_weight`). One adapter at a time.

        Raises:
            ValueError: an adapter is unknown, repeated or merged already, or safe_merge finds
                NaN or inf.
            TypeError: the weight is not floating point (quantized).
            RuntimeError: the layer is disabled, or ZeRO-3 holds the weight elsewhere.
                After any of these nothing has changed.
        """
        chosen = self._active if adapter_names is None else adapter_names
        names = self._check_names("adapter_names", chosen)
        for name in names:
            if name in self.merged_adapters:
                rest = [a for a in self.bases if a not in self.merged_adapters]
                choose = f", or choose from {rest}" if rest else ""
                raise ValueError(
                    f"adapter_names: {name!r} is merged already; unmerge() first{choose}"
                )
        if self._disabled:
            raise RuntimeError("merge() on a disabled layer; call enable() first")
        if keep_original and self.merged:
            raise ValueError(
                f"keep_original must be given at the first merge; {self.merged_adapters} are in "
                "the weight already, unmerge() first"
            )
        weight = self._mergeable_weight()
        if rounding_seed is None:
            total = self._weight_plus(names, +1)
        else:
            total = self._weight_rounded(names, rounding_seed)
        if safe_merge and not bool(full_tensor(torch.isfinite(total).all())):
            raise ValueError(
                f"adapter_names {names}: the merged weight would hold NaN or inf, and safe_merge "
                "allows only finite values; nothing was changed"
            )
        original = weight.detach().to("cpu", copy=True) if keep_original else self._original_weight
        self._replace_weight(total, [*self.merged_adapters, *names], original)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Removes all merged adapters from the base weight.

        After ``merge(keep_original=True)`` W is restored bit for bit. Otherwise dW is recomputed
        and subtracted, so lambda and gamma must be those that were merged; two roundings bring W
        back to within one ulp of the larger of W and W + dW.

        Warns, as PEFT does, if nothing is merged.
        """
        if not self.merged:
            warnings.warn("unmerge(): no adapter is merged, nothing to do", stacklevel=2)
            return
        restored = self._original_weight
        if restored is None:
            self._mergeable_weight()
            restored = self._weight_plus(self.merged_adapters, -1)
        self._replace_weight(restored, [], None)

    def _replace_weight(self, values: Tensor, merged: list[str], original: Tensor | None) -> None:
        """Writes W and the attributes about it; Ctrl-C cannot leave only some of them written."""

        def write() -> None:
            self.base_layer.weight.copy_(values)
            self._original_weight, self.merged_adapters = original, merged

        complete(write)

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        if self.merged:
            warnings.warn(
                f"{prefix}base_layer.weight of this state dict holds the merged adapters "
                f"{self.merged_adapters}; a layer that loads it with their lambda and gamma adds "
                "them twice. Call unmerge() first, or merge_and_unload() for weights alone",
                stacklevel=2,
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _weight_plus(self, names: list[str], sign: int) -> Tensor:
        weight = self.base_layer.weight
        # Wider than the weight: the sum of all adapters is rounded once.
        wide = torch.float32 if weight.itemsize < 4 else torch.float64
        total = weight.to(wide, copy=True)
        for name in names:
            delta = self._delta(name, adapter_dtype(weight.dtype))
            total.add_(laid_out_like(delta, weight), alpha=sign)
        return total.to(weight.dtype)

    def _weight_rounded(self, names: list[str], seed: int) -> Tensor:
        weight = self.base_layer.weight
        if len(names) != 1 or weight.itemsize != 2:
            raise ValueError(
                f"rounding_seed rounds one adapter into a 16-bit weight, got adapters {names} and "
                f"a weight of {weight.dtype}"
            )
        (name,) = names
        lam, gam = self._diagonals(name)
        oriented = (
            full_tensor(weight).T.contiguous() if self.fan_in_fan_out else full_tensor(weight)
        )
        total = merged_weight(self.bases[name], oriented, lam, gam, self.scaling[name], seed)
        return laid_out_like(total.T if self.fan_in_fan_out else total, weight)

    def _mergeable_weight(self) -> Tensor:
        weight = self.base_layer.weight
        if not weight.is_floating_point():
            raise TypeError(f"base_layer.weight must be floating point, got {weight.dtype}")
        if weight.numel() != self.in_features * self.out_features:
            raise RuntimeError(
                f"base_layer.weight is {tuple(weight.shape)} here and lies elsewhere (DeepSpeed "
                "ZeRO-3?); merge inside deepspeed.zero.GatheredParameters(layer.parameters(), "
                "modifier_rank=0)"
            )
        return weight
