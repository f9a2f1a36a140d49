"""PEFT's bases, packed: the dictionary that PEFT keeps them in, and one layer's `TernaryBasis`."""

import itertools
import warnings
import weakref

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from ..basis import TernaryBasis
from ..basis.cache import ordinary_tensors
from .ternary_tensor import TernaryTensor

BASES = ("randlora_A", "randlora_B")  # PEFT's names
_tokens = itertools.count()
_alive: "weakref.WeakValueDictionary[int, PackedBases]" = weakref.WeakValueDictionary()


class PackedBases(BufferDict):
    """PEFT's ``BufferDict`` of one basis (A or B) by adapter, ternary ones packed.

    The tensors are no registered buffers, so nothing casts them, and DistributedDataParallel does
    not send them. A ternary tensor is packed as it is put in; another (PEFT's default uniform
    basis) is kept as it is. Where ``persistent``, a state dict holds them dense as PEFT's does, but
    once: under the tuner, or, in a model from ``inject_adapter_in_model``, which has no tuner,
    under the first layer. Layers only refer to the dictionary (`Accelerated.__setattr__`).
    """

    def __init__(self, persistent: bool) -> None:
        super().__init__(persistent=persistent)
        self.__dict__["_bases"] = {}  # not in nn.Module's tables: see above
        self._changed()

    @classmethod
    def of(cls, dense: BufferDict) -> "PackedBases":
        packed = cls(dense.persistent)
        packed.update(dict(dense.items()))
        return packed

    def _changed(self) -> None:
        # Plain values, which torch.compile can guard on, beside tensors that it cannot look into.
        self.__dict__["_token"] = next(_tokens)  # of this content, in this process
        _alive[self._token] = self
        self.__dict__["_dtypes"] = {name: basis.dtype for name, basis in self._bases.items()}
        self.__dict__["_of_layers"] = {}
        self.__dict__["_traced"] = _Traced()

    def dtype_of(self, adapter: str) -> torch.dtype:
        return self._dtypes[adapter]

    def layer_basis(
        self, B: "PackedBases", adapter: str, in_features: int, out_features: int, r: int
    ) -> tuple[TernaryBasis | None, str]:
        """`layer_basis` of this A and that B, remembered until one of them changes."""
        sizes = adapter, in_features, out_features, r
        if torch.compiler.is_dynamo_compiling():
            return getattr(self._traced, self._trace_layer_basis(B._token, *sizes))
        key = (B._token, *sizes)
        made = self._of_layers
        if key not in made:
            for other in [k for k in made if k[0] != B._token]:
                del made[other]
            made[key] = layer_basis(self[adapter], B[adapter], *sizes[1:])
        return made[key]

    @torch.compiler.assume_constant_result  # Dynamo runs it while it traces; see tracing.py
    def _trace_layer_basis(self, token_of_B: int, *sizes) -> str:
        # The token is there to be guarded on: what was made of another B would still be there.
        name = "_".join(map(str, (token_of_B, *sizes)))
        setattr(self._traced, name, self.layer_basis(_alive[token_of_B], *sizes))
        return name

    @torch.compiler.assume_constant_result  # when it traces, as warnings are no part of a graph
    def tell_once(self, reason: str) -> None:
        """Warns that dense bases are in use, once a model: its layers hold the same dictionary."""
        if not self.__dict__.setdefault("_told", False):
            self.__dict__["_told"] = True
            warnings.warn(
                f"RandLoRA layers of this model multiply by dense bases: {reason}. The kernels of "
                "randlora_ext need ternary bases (sparse=True, very_sparse=True or a density).",
                stacklevel=4,
            )

    def __getattr__(self, name: str):
        # As a buffer is an attribute of PEFT's dictionary; transformers loads adapters by it.
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
        if not isinstance(basis, TernaryTensor) and basis.device.type != "meta":
            try:
                basis = TernaryTensor.of(basis)
            except ValueError:
                pass  # not ternary; `layer_basis` says so
            else:
                # Every adapter's file holds its own copy of what is the same basis.
                for other in self._bases.values():
                    if isinstance(other, TernaryTensor) and basis.matrix.equals(other.matrix):
                        basis = TernaryTensor(other.matrix, basis.shape, basis.dtype, basis.device)
                        break
        self._bases[key] = basis
        self._changed()

    def __delitem__(self, key: str) -> None:
        del self._bases[key]
        self._changed()

    def __len__(self) -> int:
        return len(self._bases)

    def __iter__(self):
        return iter(self._bases)

    def __contains__(self, key: str) -> bool:
        return key in self._bases

    def keys(self):
        return self._bases.keys()

    def items(self):
        return self._bases.items()

    def values(self):
        return self._bases.values()

    def _apply(self, fn, recurse: bool = True):
        for key, basis in self._bases.items():
            self._bases[key] = fn(basis)
        self._changed()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        if not self.persistent or self.__dict__.get("_written", lambda: None)() is destination:
            return
        try:
            self.__dict__["_written"] = weakref.ref(destination)
        except TypeError:  # a plain dict; then every layer writes, as with stock PEFT
            pass
        for key, basis in self._bases.items():
            dense = basis.dense() if isinstance(basis, TernaryTensor) else basis
            destination[prefix + key] = dense if keep_vars else dense.detach()

    def __getstate__(self) -> dict:
        made = ("_written", "_token", "_dtypes", "_of_layers", "_traced")
        return {key: value for key, value in self.__dict__.items() if key not in made}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._changed()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        known = {prefix + key: key for key in self._bases} if self.persistent else {}
        for name, key in known.items():
            basis = self._bases[key]
            if (saved := state_dict.get(name)) is None:
                missing_keys.append(name)
            elif error := misfit(name, saved, basis):
                error_msgs.append(error)
            else:
                self[key] = saved.to(dtype=basis.dtype, device=basis.device, copy=True)
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]


class _Traced:
    """Bases of layers as attributes: Dynamo sees a new one, but no new entry of a dictionary."""


def misfit(name: str, saved: Tensor, own: Tensor) -> str:
    """What forbids to load a tensor over another, in torch's words; "" where nothing does."""
    if saved.shape != own.shape:
        return (
            f"size mismatch for {name}: copying a param with shape {saved.shape} from checkpoint, "
            f"the shape in current model is {own.shape}."
        )
    if not saved.is_floating_point():
        return f"dtype mismatch for {name}: the checkpoint has {saved.dtype}, not floating point."
    return ""


def layer_basis(
    A: Tensor, B: Tensor, in_features: int, out_features: int, r: int
) -> tuple[TernaryBasis | None, str]:
    """The basis of one layer shape: (basis, ""), or (None, why there is none).

    Layers of equal shape get the same object, hence share what it packs.

    Args:
        A: (>= r, 1, >= d).  B: (>= D, >= n, >= r). A layer's own are the slices from the front; in
            PEFT's flat order they are the first K columns of B.

    Raises ValueError where they are too small.
    """
    d, D = min(in_features, out_features), max(in_features, out_features)
    n = -(-d // r)
    if A.shape[0] < r or A.shape[-1] < d or B.shape[0] < D or B.shape[1] < n or B.shape[2] < r:
        raise ValueError(
            f"randlora_A {tuple(A.shape)} and randlora_B {tuple(B.shape)} are too small for a "
            f"layer of {in_features} -> {out_features} features at r={r}, which needs "
            f"(>= {r}, 1, >= {d}) and (>= {D}, >= {n}, >= {r})"
        )
    if not isinstance(A, TernaryTensor) or not isinstance(B, TernaryTensor):
        name = "randlora_B" if isinstance(A, TernaryTensor) else "randlora_A"
        return None, f"{name} is not ternary"
    key = (B.matrix, in_features, out_features, r)
    made = A.matrix.layers
    if key not in made:
        turned = made.get((B.matrix, out_features, in_features, r))
        made[key] = _layer_basis(A, B, *key[1:]) if turned is None else turned.transposed()
    return made[key], ""


def _layer_basis(
    A: TernaryTensor, B: TernaryTensor, in_features: int, out_features: int, r: int
) -> TernaryBasis:
    with ordinary_tensors():
        g = B.matrix.generated
        if A.matrix.generated is not None and g is not None:
            return TernaryBasis(in_features, out_features, r, g.density, g.seed, g.kind)
        if B.shape[2] != r:  # columns from inside every row, which only a dense B can give
            dense_a, dense_b = A.dense()[:r], B.dense()[:, :, :r]
            return TernaryBasis.from_dense(dense_a, dense_b, in_features, out_features)
        a, b = A.matrix, B.matrix
        planes = a.on(A.device)[:, :r], b.on(B.device)
        sizes = in_features, out_features
        return TernaryBasis.from_planes(*planes, a.value, b.value, *sizes, copy=False)
