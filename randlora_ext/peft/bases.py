"""From PEFT's dense bases to packed ones: imported once per pair of tensors and layer shape."""

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..basis import TernaryBasis

_Stamp = tuple


@dataclass(frozen=True)
class _Import:
    A: _Stamp
    B: _Stamp
    basis: TernaryBasis | None
    reason: str


# A -> {(in, out, r): import}. An import lives as long as A, and holds neither A nor B.
_imports: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def ternary_basis(
    A: Tensor, B: Tensor, in_features: int, out_features: int, r: int
) -> tuple[TernaryBasis | None, str]:
    """The packed form of PEFT's bases for one layer shape: (basis, ""), or (None, why not).

    Layers of equal shape get the same object, hence share what it packs. Imported anew when a
    tensor was replaced (``.to``, assignment) or written to (``load_state_dict``).

    Args:
        A: (>= r, 1, >= d).  B: (>= D, >= n, >= r). This layer's are the slices from the front.

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
    key = (in_features, out_features, r)
    stamp_a, stamp_b = _stamp(A), _stamp(B)
    with _lock:
        of_a = _imports.get(A)
        if of_a is None:
            of_a = _imports[A] = {}
        known = of_a.get(key)
        if known is None or not _same(known.A, stamp_a) or not _same(known.B, stamp_b):
            known = of_a[key] = _Import(stamp_a, stamp_b, *_import(A, B, *key))
    return known.basis, known.reason


def _import(A: Tensor, B: Tensor, in_features: int, out_features: int, r: int):
    try:
        # Made under inference_mode the packed tensors could not serve a later training step.
        with torch.inference_mode(False), torch.no_grad():
            return TernaryBasis.from_dense(A[:r], B[:, :, :r], in_features, out_features), ""
    except ValueError as error:
        return None, str(error)


def _stamp(tensor: Tensor) -> _Stamp:
    # Tensors made under inference_mode count no versions; they can only be replaced as a whole.
    version = 0 if tensor.is_inference() else tensor._version
    return (weakref.ref(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device)


def _same(old: _Stamp, new: _Stamp) -> bool:
    return old[0]() is new[0]() and old[1:] == new[1:]
