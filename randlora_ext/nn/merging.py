"""Merging adapters into the weight of a base layer; unmerging puts W back, bit for bit."""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import warn_user
from ..ranks import full_tensor, local_tensor
from .input_scale import InputScales

# By each of a weight's `_marks`, the layer that was merged into it last.
_last_merged: "weakref.WeakValueDictionary[int, Mergeable]" = weakref.WeakValueDictionary()


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lambda, gamma and dW beside a weight of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Mergeable(nn.Module):
    """Writes adapters into the base layer's weight, and keeps W on the CPU until `unmerge`.

    Quantized layers replace the methods from `_held_weight` to `_restorer`. Layers that mix this in
    have these attributes, `_base_weight` and `_delta`.
    """

    in_features: int
    out_features: int
    experts: tuple[int, ...] = ()  # how many, if the weight is a stack
    _path: str | None = None  # in the model, for error messages
    # Of each adapter, by its name.
    randlora_lambda: nn.ParameterDict
    randlora_gamma: nn.ParameterDict
    randlora_input_scale: InputScales  # of those on Hadamard bases
    randlora_record: Any  # nn.ModuleDict of an AdapterRecord for those on generated bases
    merged_adapters: list[str]
    # W as `_keep` gives it, while an adapter is merged. In a tuple, because nn.Module would take a
    # quantized base layer for a part of this one.
    _kept: tuple[Any, ...] = ()

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        weight = self._held_weight() if self.merged else None
        if weight is not None:  # of a copy or a pickle, which `_refuse_shared` has not seen
            _last_merged.update(dict.fromkeys(_marks(weight), self))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts back W as it was before the first merge, bit for bit, and frees what was kept.

        If the layer has been moved or cast since, W comes back on the device and in the dtype of
        the merged weight. Warns, as PEFT does, if nothing is merged. Raises RuntimeError, and
        changes nothing, if the weight has another shape here than when it was merged.
        """
        if not self.merged:
            warn_user("Already unmerged. Nothing to do.")
            return
        restore = self._restorer(*self._kept)
        restore()
        self.merged_adapters = []
        self._kept = ()

    def _merge(self, names: Sequence[str], safe_merge: bool) -> None:
        """Merges adapters that are known and not merged yet."""
        self._refuse_shared()
        write = self._writer(self._merged_weight(names, safe_merge))
        if not self.merged:
            self._kept = (self._keep(),)
        # Before W changes: if Ctrl-C interrupts the write, `unmerge` still restores W.
        self.merged_adapters = [*self.merged_adapters, *names]
        write()

    def _merged_weight(self, names: Sequence[str], safe_merge: bool) -> Tensor:
        """W + dW; ValueError if it must be `safe_merge` and is not finite."""
        total = self._weight_with_adapters(self._dense_weight(), names)
        if safe_merge and not bool(full_tensor(torch.isfinite(total).all())):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be "
                "broken; safe_merge allows only finite values, and nothing was changed"
            )
        return total

    def _refuse_shared(self) -> None:
        """Raises RuntimeError if another layer is merged into the same weight: unmerging the two in
        any order could not restore it."""
        weight = self._held_weight()
        if weight is None:
            return
        marks = _marks(weight)
        for mark in marks:
            other = _last_merged.get(mark)
            if other is None or other is self or not other.merged:
                continue
            held = other._held_weight()
            # Another weight may have had the same address before.
            if held is not None and mark in _marks(held):
                raise RuntimeError(
                    f"{other._in_words()} is merged into the weight of {self._in_words()}, which "
                    "can hold the change of one layer only; use them unmerged"
                )
        _last_merged.update(dict.fromkeys(marks, self))

    def _warn_if_trained(self) -> None:
        """Warns in forward of merged adapters that would be trained: torch's error in backward, if
        there is one, does not say why they have no gradient."""
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        lambdas = self.randlora_lambda
        merged = [name for name in self.merged_adapters if name in lambdas]
        trained = [name for name in merged if lambdas[name].requires_grad]
        if trained:
            warn_user(
                f"the adapters {trained} are merged into the weight and get no gradient; call "
                "unmerge() (in PEFT unmerge_adapter()) before training, else eval()"
            )

    def _weight_with_adapters(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        """`weight` plus the dW of these adapters."""
        # Wider than the weight where the sum would otherwise be rounded more than once.
        wide = torch.float32 if weight.itemsize < 4 or len(names) == 1 else torch.float64
        total = weight.to(torch.promote_types(wide, weight.dtype), copy=True)
        for name in names:
            total.add_(self._delta(name, adapter_dtype(weight.dtype)))
        return total.to(weight.dtype)

    def get_base_layer(self) -> nn.Module:
        """The frozen layer, or the module that has the parameter."""
        raise NotImplementedError

    def _base_weight(self) -> Tensor:
        """The weight of the base layer; of a quantized one an empty tensor of the dtype and on the
        device in which it computes."""
        raise NotImplementedError

    def _delta(self, name: str, dtype: torch.dtype) -> Tensor:
        """dW of the adapter in that dtype, in shape and layout of the base weight."""
        raise NotImplementedError

    def _held_weight(self) -> Tensor | None:
        """What merging writes into; None if it replaces the base layer."""
        return self._base_weight()

    def _dense_weight(self) -> Tensor:
        """W as a tensor to which dW can be added."""
        self._check_writable()
        return self._base_weight()

    def _check_writable(self) -> None:
        """Raises TypeError or RuntimeError if dW cannot be written into the weight or would be
        lost."""
        weight = self._held_weight()
        if weight is None:
            return
        base = self.get_base_layer()
        held = (*base.parameters(recurse=False), *base.buffers(recurse=False))
        if not any(weight is tensor for tensor in held):
            raise TypeError(
                f"{self._in_words()}: base_layer.weight is computed at every use (by a "
                "parametrization, weight_norm, spectral_norm or pruning) and cannot be merged "
                "into; remove that first"
            )
        if weight.is_meta:
            raise RuntimeError(
                f"{self._in_words()}: base_layer.weight has no numbers (meta device)"
            )
        if not weight.is_floating_point() or weight.itemsize < 2:  # torch adds nothing to float8
            raise TypeError(
                f"base_layer.weight must be floating point of 16 bits or more, got {weight.dtype}"
            )
        if weight.numel() != math.prod((*self.experts, self.in_features, self.out_features)):
            raise RuntimeError(
                f"base_layer.weight is {tuple(weight.shape)} here and lies elsewhere (DeepSpeed "
                "ZeRO-3?); merge inside deepspeed.zero.GatheredParameters(layer.parameters(), "
                "modifier_rank=0)"
            )

    def _in_words(self) -> str:
        """What messages call the layer: its path, if it knows that."""
        if self._path:
            return f"layer {self._path!r}"
        return f"{type(self).__name__}({self.extra_repr()})"

    def _writer(self, total: Tensor) -> Callable[[], object]:
        """Prepares everything that can fail; the result only writes."""
        weight = self._base_weight()
        return lambda: weight.copy_(total)

    def _keep(self) -> Any:
        """The present weight, as `_restorer` takes it."""
        return local_tensor(self._dense_weight().detach()).to("cpu", copy=True)

    def _restorer(self, kept: Any) -> Callable[[], object]:
        """As `_writer`, of what was kept."""
        weight = local_tensor(self._dense_weight())
        if weight.shape != kept.shape:
            raise RuntimeError(
                f"base_layer.weight is {tuple(weight.shape)} on this rank, and was "
                f"{tuple(kept.shape)} when adapters were merged into it; unmerge in the layout in "
                "which you merged"
            )
        return lambda: weight.copy_(kept)


def _marks(weight: Tensor) -> tuple[int, int]:
    """Two weights that have one of these in common are the same numbers: the object, which stays
    when a module is moved or cast, and where its memory begins."""
    return id(weight), _place(weight)


def _place(weight: Tensor) -> int:
    return local_tensor(weight).data_ptr() or id(weight)  # torchao's weights tell no place


def release_weight(layer: Mergeable) -> None:
    """Lets others merge into the weight of a layer whose base layer goes on without it."""
    for mark, merged in [*_last_merged.items()]:
        if merged is layer:
            del _last_merged[mark]


def check_mergeable(layers: Mapping[str, Mergeable]) -> None:
    """Raises, before one of a model's adapted layers is merged, what forbids it: RuntimeError if
    two layers share a weight, and the errors of merging."""
    first: dict[int, Mergeable] = {}
    for path, layer in layers.items():
        layer._path = path
        weight = layer._held_weight()
        if weight is None:
            continue
        if weight.is_meta and hasattr(layer.get_base_layer(), "_hf_hook"):
            continue  # accelerate will bring it
        layer._check_writable()
        other = first.setdefault(_place(weight), layer)
        if other is not layer:
            raise RuntimeError(
                f"{other._in_words()} and {layer._in_words()} share one weight, which can hold the "
                "change of one of them only; use them unmerged"
            )
