"""Merging adapters into the weight of a base layer, and taking them out again, bit for bit."""

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_one_of, warn_user
from ..ranks import full_tensor, is_dtensor, local_tensor
from .base_layer import check_writable, do_nothing
from .shared import refuse_shared

KEEP_WEIGHT = ("host", "device", "nothing")


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lambda, gamma and dW beside a weight of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class KeepsWeight(nn.Module):
    """Writes adapters into the base layer's weight and keeps W, so that `unmerge` restores it.

    Only W itself restores every bit whatever happens in between: a difference to the merged weight
    would need that weight, or lambda and gamma, unchanged. It is kept once, as a plain attribute,
    so no state dict holds it and no `.to()` moves or casts it. Of layers that share a weight only
    one may be merged; the others then compute with its change, as everything that shares W does.

    Quantized layers replace the methods from `_held_weight` to `_restorer`. Layers that mix this in
    have these parameters, `_base_weight` and `_delta`.
    """

    randlora_lambda: nn.ParameterDict
    path: str | None = None  # in the model, for error messages
    merged_adapters: list[str]
    _kept: Any = None  # what `_restorer` takes; None: W is not kept, or was not changed
    # Merged adapters that are not in the kept weight, or changed nothing. The others, merged with
    # keep_weight="nothing" or by stock PEFT, are subtracted.
    _kept_without: tuple[str, ...] = ()

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
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        rest = [name for name in self.merged_adapters if name not in self._kept_without]
        if lost := [name for name in rest if name not in self.randlora_lambda]:
            warnings.warn(
                f"the adapters {lost} were deleted while merged, and W was not kept: their dW "
                "stays in it",
                stacklevel=2,
            )
        rest = [name for name in rest if name not in lost]
        if self._kept is not None or not rest:
            self._replace(do_nothing if self._kept is None else self._restorer(self._kept), rest)
        if rest:
            self._replace(self._writer(self._plus(self._dense_weight(), rest, -1)), [])

    def _merge(self, names: Sequence[str], safe_merge: bool, keep_weight: str) -> None:
        """Merges adapters that are known and not merged yet."""
        check_one_of("keep_weight", keep_weight, KEEP_WEIGHT)
        thread = threading.get_ident()
        # Before the comparison: of two threads that come here at once, one at least sees the other.
        _being_merged[thread] = self
        try:
            for other in (*_living(_merged_layers), *_living(_being_merged)):
                refuse_shared(other, self)
            self._add(names, safe_merge, keep_weight)
        finally:
            _being_merged.pop(thread, None)

    def _add(self, names: Sequence[str], safe_merge: bool, keep_weight: str) -> None:
        weight = self._dense_weight()
        total = self._plus(weight, names, +1)
        if safe_merge and not bool(full_tensor(torch.isfinite(total).all())):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be "
                "broken; safe_merge allows only finite values, and nothing was changed"
            )
        merged = [*self.merged_adapters, *names]
        kept, without = (self._kept, self._kept_without) if self.merged else (None, ())
        with_these = (*without, *names)
        if keep_weight == "nothing":
            if kept is not None:  # by an earlier merge; that weight is without these adapters, too
                without = with_these
            self._replace(self._writer(total), merged, kept, without)
            return
        # Ranks might disagree about their parts of DTensors.
        if not is_dtensor(total) and torch.equal(total, weight):
            # Nothing is written, because a sum could still turn -0 into 0.
            self._replace(do_nothing, merged, kept, with_these)
            return
        write = self._writer(total)
        if kept is None:
            kept = self._keep(keep_weight)
        self._replace(write, merged, kept, with_these)

    def _replace(
        self, write: Callable, merged: list[str], kept: Any = None, without: tuple[str, ...] = ()
    ) -> None:
        """Writes W and the attributes about it; Ctrl-C, twice even, cannot leave a part of them."""

        def write_all() -> None:
            write()
            self._kept, self._kept_without = kept, without
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
        if trained := [name for name in merged if lambdas[name].requires_grad]:
            warn_user(
                f"the adapters {trained} are merged into the weight and get no gradient; call "
                "unmerge() (in PEFT unmerge_adapter()) before training, else eval()"
            )

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.merged:  # a copy
            remember_merged(self)

    def _plus(self, weight: Tensor, names: Sequence[str], sign: int) -> Tensor:
        # Wider than the weight where the sum would otherwise be rounded more than once.
        wide = torch.float32 if weight.itemsize < 4 or len(names) == 1 else torch.float64
        total = weight.to(torch.promote_types(wide, weight.dtype), copy=True)
        for name in names:
            total.add_(self._delta(name, adapter_dtype(weight.dtype)), alpha=sign)
        return total.to(weight.dtype)

    def _base_weight(self) -> Tensor:
        """The weight of the base layer, in the dtype and on the device in which that computes."""
        raise NotImplementedError

    def _delta(self, name: str, dtype: torch.dtype) -> Tensor:
        """dW of the adapter in that dtype, in shape and layout of the base weight."""
        raise NotImplementedError

    def _held_weight(self) -> Tensor | None:
        """What merging writes into or replaces; None if it replaces the base layer."""
        return self._base_weight()

    def _dense_weight(self) -> Any:
        check_writable(self)
        return self._held_weight()

    def _writer(self, total: Tensor) -> Callable[[], Any]:
        """Prepares everything that can fail; the result only writes, and may be called twice."""
        weight: Any = self._held_weight()
        return lambda: weight.copy_(total)

    def _keep(self, keep_weight: str) -> Any:
        """The present weight; in a tuple if torch would register it as a parameter or module."""
        with torch.inference_mode(False):  # it is kept for longer
            weight = local_tensor(self._dense_weight().detach())
            return weight.to("cpu" if keep_weight == "host" else weight.device, copy=True)

    def _restorer(self, kept: Any) -> Callable[[], Any]:
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


def _living(layers: "weakref.WeakValueDictionary[int, KeepsWeight]") -> list[KeepsWeight]:
    references = (reference() for reference in layers.valuerefs())  # copied in one step
    return [layer for layer in references if layer is not None]


def remember_merged(layer: KeepsWeight) -> None:
    _merged_layers[id(layer)] = layer


def forget_merged(layer: KeepsWeight) -> None:
    """Also if it is still merged, but nothing can unmerge it any more."""
    _merged_layers.pop(id(layer), None)
