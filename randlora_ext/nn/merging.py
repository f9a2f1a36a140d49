"""Merging adapters into the weight of a base layer, and taking them out again, bit for bit."""

import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import at_most_ten, check_one_of, warn_user
from ..ranks import full_tensor, is_dtensor, local_tensor
from .base_layer import do_nothing
from .input_scale import InputScales
from .shared import share_numbers, sharing_pairs

KEEP_WEIGHT = ("host", "device", "nothing")


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lambda, gamma and dW beside a weight of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class KeptWeight:
    """What `unmerge` starts from.

    Attributes:
        weight: W as `_keep` gives it; None if nothing is kept, and W is in the layer's own weight.
        left_out: the merged adapters that need no subtraction: W does not hold those that were
            merged since it was kept, and others changed no bit. `unmerge` subtracts all others,
            those merged with keep_weight="nothing" or by stock PEFT.
    """

    weight: Any = None
    left_out: tuple[str, ...] = ()

    def without(self, names: Sequence[str]) -> "KeptWeight":
        """The same weight beside more adapters that it does not hold."""
        return KeptWeight(self.weight, (*self.left_out, *names))


class KeepsWeight(nn.Module):
    """Writes adapters into the base layer's weight and keeps W, so that `unmerge` restores it.

    Only W itself restores every bit whatever happens in between: a difference to the merged weight
    would need that weight, or lambda and gamma, unchanged. It is kept once, as a plain attribute,
    so no state dict holds it and no `.to()` moves or casts it. Of layers that share a weight only
    one may be merged; the others then compute with its change, as everything that shares W does.

    Quantized layers replace the methods from `_held_weight` to `_restorer`. Layers that mix this in
    have these attributes, `_base_weight` and `_delta`.
    """

    base_layer: nn.Module
    in_features: int
    out_features: int
    experts: tuple[int, ...] = ()  # how many, if the weight is a stack
    path: str | None = None  # in the model, for error messages
    # Of each adapter, by its name.
    randlora_lambda: nn.ParameterDict
    randlora_gamma: nn.ParameterDict
    randlora_input_scale: InputScales  # of those on Hadamard bases
    merged_adapters: list[str]
    _kept = KeptWeight()

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes all merged adapters out of the base weight, and frees what was kept.

        W comes back bit for bit, whatever has become of the adapters and of the merged weight; if
        the layer has been moved or cast since, on the device and in the dtype of the merged weight.

        After ``merge(keep_weight="nothing")`` dW is computed again and subtracted, so lambda and
        gamma must be those that were merged; two roundings bring W back to within one ulp of the
        larger of W and W + dW. Warns, as PEFT does, if nothing is merged.
        """
        if not self.merged:
            warn_user("Already unmerged. Nothing to do.")
            return
        held = [name for name in self.merged_adapters if name not in self._kept.left_out]
        to_subtract = [name for name in held if name in self.randlora_lambda]
        deleted = [name for name in held if name not in self.randlora_lambda]
        if deleted:
            warn_user(
                f"the adapters {deleted} were deleted while merged, and W was not kept: their dW "
                "stays in it"
            )
        if self._kept.weight is not None:
            self._replace(self._restorer(self._kept.weight), to_subtract)
        elif not to_subtract:
            self._replace(do_nothing, [])
        if to_subtract:
            unmerged = self._weight_with_adapters(self._dense_weight(), to_subtract, -1)
            self._replace(self._writer(unmerged), [])

    def _merge(self, names: Sequence[str], safe_merge: bool, keep_weight: str) -> None:
        """Merges adapters that are known and not merged yet."""
        check_one_of("keep_weight", keep_weight, KEEP_WEIGHT)
        thread = threading.get_ident()
        # Before the comparison: of two threads that come here at once, one at least sees the other.
        _being_merged[thread] = self
        try:
            for other in (*_living(_merged_layers), *_living(_being_merged)):
                _refuse_shared(other, self)
            self._add(names, safe_merge, keep_weight)
        finally:
            _being_merged.pop(thread, None)

    def _add(self, names: Sequence[str], safe_merge: bool, keep_weight: str) -> None:
        weight = self._dense_weight()
        total = self._weight_with_adapters(weight, names, +1)
        if safe_merge and not bool(full_tensor(torch.isfinite(total).all())):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be "
                "broken; safe_merge allows only finite values, and nothing was changed"
            )
        merged = [*self.merged_adapters, *names]
        kept = self._kept if self.merged else KeptWeight()
        if keep_weight == "nothing":
            if kept.weight is not None:  # by an earlier merge
                kept = kept.without(names)
            self._replace(self._writer(total), merged, kept)
            return
        kept = kept.without(names)
        # Ranks might disagree about their parts of DTensors.
        if not is_dtensor(total) and torch.equal(total, weight):
            # Nothing is written, because a sum could still turn -0 into 0.
            self._replace(do_nothing, merged, kept)
            return
        write = self._writer(total)
        if kept.weight is None:
            kept = KeptWeight(self._keep(keep_weight), kept.left_out)
        self._replace(write, merged, kept)

    def _replace(
        self,
        write: Callable[[], object],
        merged: list[str],
        kept: KeptWeight = KeptWeight(),
    ) -> None:
        """Writes W and the attributes about it; Ctrl-C, twice even, cannot leave a part of them."""

        def write_all() -> None:
            write()
            self._kept = kept
            self.merged_adapters = merged
            if merged:
                remember_merged(self)
            else:
                forget_merged(self)

        try:
            try:
                write_all()
            except BaseException:  # it came between two lines; writing again is harmless
                write_all()
                raise
        except BaseException:  # the second one, in the lines above
            write_all()
            raise

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

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.merged:  # a copy
            remember_merged(self)

    def _weight_with_adapters(self, weight: Tensor, names: Sequence[str], sign: int) -> Tensor:
        """`weight` plus, or with a `sign` of -1 minus, the dW of these adapters."""
        # Wider than the weight where the sum would otherwise be rounded more than once.
        wide = torch.float32 if weight.itemsize < 4 or len(names) == 1 else torch.float64
        total = weight.to(torch.promote_types(wide, weight.dtype), copy=True)
        for name in names:
            total.add_(self._delta(name, adapter_dtype(weight.dtype)), alpha=sign)
        return total.to(weight.dtype)

    def get_base_layer(self) -> nn.Module:
        """The frozen layer, or the module that has the parameter."""
        raise NotImplementedError

    def _base_weight(self) -> Tensor:
        """The weight of the base layer, in the dtype and on the device in which that computes."""
        raise NotImplementedError

    def _delta(self, name: str, dtype: torch.dtype) -> Tensor:
        """dW of the adapter in that dtype, in shape and layout of the base weight."""
        raise NotImplementedError

    def _held_weight(self) -> Tensor | None:
        """What merging writes into or replaces; None if it replaces the base layer."""
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
        if self.path:
            return f"layer {self.path!r}"
        return f"{type(self).__name__}({self.extra_repr()})"

    def _writer(self, total: Tensor) -> Callable[[], object]:
        """Prepares everything that can fail; the result only writes, and may be called twice."""
        weight = self._base_weight()
        return lambda: weight.copy_(total)

    def _keep(self, keep_weight: str) -> Any:
        """The present weight, as `_restorer` takes it."""
        with torch.inference_mode(False):  # it is kept for longer
            weight = local_tensor(self._dense_weight().detach())
            return weight.to("cpu" if keep_weight == "host" else weight.device, copy=True)

    def _restorer(self, kept: Any) -> Callable[[], object]:
        weight = local_tensor(self._dense_weight())
        if weight.shape != kept.shape:
            raise RuntimeError(
                f"base_layer.weight is {tuple(weight.shape)} on this rank, and was "
                f"{tuple(kept.shape)} when adapters were merged into it; unmerge in the layout in "
                "which you merged"
            )
        return lambda: weight.copy_(kept)


# By their ids, the layers in which an adapter is merged and could be unmerged. Not a WeakSet: other
# threads merge other models, and to iterate over a set that changes is an error.
_merged_layers: "weakref.WeakValueDictionary[int, KeepsWeight]" = weakref.WeakValueDictionary()
# By threads. Not a lock: Ctrl-C could leave it locked, and the next merge would wait for ever.
_being_merged: "weakref.WeakValueDictionary[int, KeepsWeight]" = weakref.WeakValueDictionary()
if hasattr(os, "register_at_fork"):  # not on Windows
    # A forked child has only the thread that forked it, and no merge of another would end there.
    os.register_at_fork(after_in_child=_being_merged.clear)


def _living(layers: "weakref.WeakValueDictionary[int, KeepsWeight]") -> list[KeepsWeight]:
    references = (reference() for reference in layers.valuerefs())  # copied in one step
    return [layer for layer in references if layer is not None]


def remember_merged(layer: KeepsWeight) -> None:
    _merged_layers[id(layer)] = layer


def forget_merged(layer: KeepsWeight) -> None:
    """Also if it is still merged, but nothing can unmerge it any more."""
    _merged_layers.pop(id(layer), None)


# ---- layers whose weights lie in the same memory ------------------------------------------------


def check_mergeable(layers: Mapping[str, KeepsWeight]) -> None:
    """Raises, before one of a model's adapted layers is merged, what another's weight forbids."""
    weights: dict[KeepsWeight, Tensor] = {}
    for path, layer in layers.items():
        layer.path = path
        weight = layer._held_weight()
        if weight is not None and weight.is_meta and hasattr(layer.get_base_layer(), "_hf_hook"):
            continue  # accelerate will bring it
        layer._check_writable()
        if weight is not None:
            weights[layer] = weight
    for one, other in sharing_pairs(weights):
        _refuse_shared(one, other)


def _refuse_shared(one: KeepsWeight, other: KeepsWeight) -> None:
    """Raises RuntimeError, naming both layers, if they share numbers: W can hold one dW."""
    if one is other:
        return
    weight, other_weight = one._held_weight(), other._held_weight()
    if weight is None or other_weight is None or not share_numbers(weight, other_weight):
        return
    raise RuntimeError(
        f"{one._in_words()} and {other._in_words()} share one weight, which can hold the change of "
        "one of them only; use them unmerged"
    )


def warn_of_shared(model: nn.Module, layers: Mapping[str, KeepsWeight]) -> None:
    """Warns if a tensor of the model outside of `layers`, which stand or will stand at these paths,
    shares numbers with the weight of one."""
    if "" in layers:  # the model is the layer
        return
    tensors: dict[KeepsWeight | str, Tensor] = {}
    for layer in layers.values():
        weight = layer._held_weight()
        if weight is not None:
            tensors[layer] = weight
    inside = tuple(f"{path}." for path in layers)
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if not f"{name}.".startswith(inside):
                tensors[name] = tensor
    found = []
    for pair in sharing_pairs(tensors):
        names = [each for each in pair if isinstance(each, str)]
        adapted = [each for each in pair if not isinstance(each, str)]
        if names and adapted:
            found.append(f"{adapted[0]._in_words()} with {names[0]!r}")
    if found:
        warn_user(
            "adapted layers share weights with modules that have no adapter, "
            f"{at_most_ten(found)}: merging changes these modules, too. Clone the weight of the "
            "layer before, or use the adapter unmerged"
        )
