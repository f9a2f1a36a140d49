"""PEFT's bases, packed: the dictionary that holds them by adapter, and one layer's basis."""

import itertools
import warnings
from collections.abc import Iterator, MutableMapping
from weakref import ref

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..basis import TernaryBasis
from ..basis.cache import ordinary_tensors
from ..basis.dense import DenseMatrices
from ..nn.state_dict import misfit
from .ternary_tensor import TernaryTensor

_tokens = itertools.count()
# Bases that layers made from an A and a B (keys: their signs, or dense tensors), by features and r.
_made: WeakIdKeyDictionary = WeakIdKeyDictionary()


class PackedBufferDict(MutableMapping, BufferDict):
    """PEFT's ``BufferDict`` of one basis (A or B) by adapter, with ternary ones packed.

    The tensors are not registered buffers, so DistributedDataParallel does not send them. A ternary
    tensor is packed as it is put in; another (PEFT's default uniform basis) is kept as it is. Model
    and layers share one dictionary. A state dict holds its saved bases dense and once: under the
    model, or under the first layer if `inject_adapter_in_model` made no model.

    A cast to 16 bits rounds the value of a saved ternary basis, as PEFT's. If no file holds the
    basis, a new model draws it without that rounding, so the value stays what was drawn.
    """

    __hash__ = nn.Module.__hash__
    __eq__ = nn.Module.__eq__

    def __init__(self) -> None:
        super().__init__(persistent=True)
        self.__dict__["_bases"] = {}
        self.__dict__["_unsaved"] = set()  # adapters whose bases no file holds
        self._changed()

    @classmethod
    def of(cls, dense: BufferDict) -> "PackedBufferDict":
        if isinstance(dense, cls):
            return dense
        packed = cls()
        for adapter, basis in dense.items():
            packed.add(adapter, basis, dense.persistent)
        return packed

    def add(self, adapter: str, basis: Tensor, saved: bool) -> None:
        self[adapter] = basis
        if not saved:
            self._unsaved.add(adapter)

    def saved(self, adapter: str) -> bool:
        """Whether files hold the adapter's basis."""
        return adapter not in self._unsaved

    def _changed(self) -> None:
        # Plain values, which torch.compile can guard on, beside tensors that it cannot look into.
        self.__dict__["token"] = next(_tokens)  # of this content, in this process
        self.__dict__["dtypes"] = {name: basis.dtype for name, basis in self._bases.items()}
        self.__dict__["traced"] = _Traced()

    def warn_once(self, told: str) -> None:
        """Warns once per model."""
        if not self.__dict__.get("_warned"):
            self.__dict__["_warned"] = True
            warnings.warn(told, stacklevel=4)

    # In PEFT's dictionary buffers are attributes; transformers loads adapters through them.

    def __getattr__(self, name: str):
        bases = self.__dict__.get("_bases", {})
        return bases[name] if name in bases else super().__getattr__(name)

    def __setattr__(self, name: str, value) -> None:
        if name in self.__dict__.get("_bases", {}):
            self[name] = value.detach()
        else:
            super().__setattr__(name, value)

    def __getitem__(self, key: str) -> Tensor:
        return self._bases[key]

    def __setitem__(self, key: str, basis: Tensor) -> None:
        if not isinstance(basis, TernaryTensor):
            if basis.is_meta:
                if key in self._bases:  # PEFT moves bases with a weight; these would be lost
                    return
                raise ValueError(f"the basis of adapter {key!r} is on the meta device: no values")
            try:
                basis = self._unless_known(TernaryTensor.of(basis))
            except ValueError:
                pass  # not ternary: layers multiply by it as it is
        self._bases[key] = self._unrounded(key, basis)
        self._changed()

    def _unrounded(self, key: str, cast: Tensor) -> Tensor:
        """`cast`, with the value from before the cast if the basis is ternary and not saved."""
        old = self._bases.get(key)
        if self.saved(key) or not isinstance(old, TernaryTensor):
            return cast
        if not isinstance(cast, TernaryTensor) or cast.signs is not old.signs:  # another basis
            return cast
        return TernaryTensor(cast.signs, old.value, cast.shape, cast.dtype, cast.device)

    def _unless_known(self, new: TernaryTensor) -> TernaryTensor:
        """`new`, sharing signs with an equal basis: every adapter's file holds its own copy."""
        for old in self._bases.values():
            if isinstance(old, TernaryTensor) and old.shape == new.shape:
                known, planes = old.signs.planes, new.signs.planes
                if known is not None and planes is not None and torch.equal(known, planes):
                    return TernaryTensor(old.signs, new.value, new.shape, new.dtype, new.device)
        return new

    def __delitem__(self, key: str) -> None:
        del self._bases[key]
        self._unsaved.discard(key)
        self._changed()

    def __len__(self) -> int:
        return len(self._bases)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bases)

    def _apply(self, fn, recurse: bool = True):
        # Takes only device and dtype from `fn`: `to_empty` would leave arbitrary values.
        for key, basis in self._bases.items():
            probe = fn(torch.empty(0, dtype=basis.dtype, device=basis.device))
            if isinstance(basis, TernaryTensor):
                self._bases[key] = self._unrounded(key, basis.moved(probe.device, probe.dtype))
            elif not probe.is_meta:
                self._bases[key] = basis.to(probe.device, probe.dtype)
        self._changed()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        if self.__dict__.get("_written", lambda: None)() is destination:
            return
        try:
            self.__dict__["_written"] = ref(destination)
        except TypeError:  # a plain dict; then every layer writes, as with stock PEFT
            pass
        for key, basis in self._bases.items():
            if self.saved(key):
                dense = basis.dense() if isinstance(basis, TernaryTensor) else basis
                destination[prefix + key] = dense if keep_vars else dense.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # The model reports missing bases, so layers that share the dictionary report none.
        known = {prefix + key: key for key in self._bases if self.saved(key)}
        for name in [name for name in known if name in state_dict]:
            saved, basis = state_dict[name], self._bases[known[name]]
            if error := misfit(name, saved, basis):
                error_msgs.append(error)
            else:
                self[known[name]] = saved.to(dtype=basis.dtype, device=basis.device, copy=True)
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]

    def __getstate__(self) -> dict:
        made = ("_written", "token", "dtypes", "traced")
        return {key: value for key, value in self.__dict__.items() if key not in made}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._changed()


class _Traced:
    """Bases of layers as attributes: Dynamo sees a new one, but no new entry of a dictionary."""


def layer_basis(
    A: Tensor, B: Tensor, in_features: int, out_features: int, r: int, served: bool = True
) -> TernaryBasis:
    """The basis of one layer shape, of kind "dense" if A or B is not ternary.

    Layers of equal shape get the same object, so they share what it packs. Bases of dense tensors
    are views of them.

    Args:
        A: (>= r, 1, >= d).  B: (>= D, >= n, >= r). A layer uses the leading slices; in PEFT's
            flat order those of B are its first K columns.
        served: whether there are kernels for packed bases; otherwise ternary ones are made dense.

    Raises ValueError if they are too small.
    """
    d, D = min(in_features, out_features), max(in_features, out_features)
    n = -(-d // r)
    if A.shape[0] < r or A.shape[-1] < d or B.shape[0] < D or B.shape[1] < n or B.shape[2] < r:
        raise ValueError(
            f"randlora_A {tuple(A.shape)} and randlora_B {tuple(B.shape)} are too small for a "
            f"layer of {in_features} -> {out_features} features at r={r}, which needs "
            f"(>= {r}, 1, >= {d}) and (>= {D}, >= {n}, >= {r})"
        )
    first, second = (t.signs if isinstance(t, TernaryTensor) else t for t in (A, B))
    made = _made.setdefault(first, WeakIdKeyDictionary()).setdefault(second, {})
    packed = served or (isinstance(A, TernaryTensor) and A.is_hadamard)
    sizes, values = (in_features, out_features, r), (_value(A), _value(B), packed)
    if (sizes, values) not in made:
        turned = made.get(((out_features, in_features, r), values))
        if turned is not None:
            basis = turned.transposed()
        elif packed and isinstance(A, TernaryTensor) and isinstance(B, TernaryTensor):
            basis = _ternary_basis(A, B, *sizes)
        else:
            if (r, values) not in made:
                made[r, values] = _dense_matrices(A, B, r)
            basis = TernaryBasis.from_dense(made[r, values], in_features, out_features)
        made[sizes, values] = basis
    return made[sizes, values]


def _value(basis: Tensor) -> float | int:
    """What may change while the key stays: the value of +1, or a dense tensor's version."""
    if isinstance(basis, TernaryTensor):
        return basis.value
    return 0 if basis.is_inference() else basis._version


@ordinary_tensors
def _dense_matrices(A: Tensor, B: Tensor, r: int) -> DenseMatrices:
    # `data`, because the value must not keep the tensor that is its weak key alive.
    A, B = (
        t.moved("cpu", t.dtype).dense() if isinstance(t, TernaryTensor) else t.data for t in (A, B)
    )
    return DenseMatrices(A[:r].flatten(1), B[..., :r].flatten(1))


@ordinary_tensors
def _ternary_basis(
    A: TernaryTensor, B: TernaryTensor, in_features: int, out_features: int, r: int
) -> TernaryBasis:
    features, described = (in_features, out_features), A.signs.description
    A, B = (t.moved("cpu", t.dtype) if t.is_meta else t for t in (A, B))
    if described is not None and described == B.signs.description:
        density, seed, kind = described.density, described.seed, described.kind
        return TernaryBasis(in_features, out_features, r, density, seed, kind)
    if B.shape[2] != r:  # takes columns from inside every row: needs a dense B
        return TernaryBasis.from_ternary(A.dense()[:r], B.dense()[:, :, :r], *features)
    planes = A.signs.on(A.device)[:, :r], B.signs.on(B.device)
    return TernaryBasis.from_planes(*planes, A.value, B.value, *features)
