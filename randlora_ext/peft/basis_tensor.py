"""`BasisTensor`: what stands for A or B of an adapter where PEFT keeps a dense tensor.

PEFT reads the shapes of its bases, moves, casts and saves them. A tensor subclass allows this:
shape, dtype, device and moves cost nothing, and any other operation works on a dense copy that is
made for it and dropped.
"""

from typing import Any

import torch
from torch import Tensor

from ..basis import BasisDescription
from ..basis.ternary import pack_dense


class BasisTensor(Tensor):
    """A matrix (rows, ...) of {-value, 0, value}, whose trailing dims are flattened into columns.

    `content` has bit planes (2, rows, ceil(columns / 64)), or the description that generates A and
    B of each layer, which has no dense form here.
    """

    content: Tensor | BasisDescription
    value: float

    @staticmethod
    def __new__(cls, content, value: float, shape, dtype, device) -> "BasisTensor":
        self = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        self.content, self.value = content, value
        return self

    @classmethod
    def packed(cls, dense: Tensor) -> "BasisTensor":
        """Packs a dense tensor exactly. Raises ValueError if it is not ternary."""
        planes, value = pack_dense("the basis", dense.detach().reshape(len(dense), -1))
        return cls(planes, value, dense.shape, dense.dtype, dense.device)

    @property
    def description(self) -> BasisDescription | None:
        return self.content if isinstance(self.content, BasisDescription) else None

    @property
    def columns(self) -> int:
        return self.shape[1:].numel()

    def dense(self) -> Tensor:
        """A new dense tensor with the same values. Raises RuntimeError if they are generated."""
        if not isinstance(self.content, Tensor):
            raise RuntimeError(
                "randlora_A and randlora_B have no dense form here, because each layer generates "
                "its own: layer.basis_of(adapter, device).dense()"
            )
        if self.is_meta:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        make = torch.ops.randlora.planes_to_dense
        dense = make(self.content, self.columns, self.value, self.dtype)
        return dense.view(self.shape).to(self.device)

    def moved(self, device: torch.device | str, dtype: torch.dtype) -> "BasisTensor":
        """The same elements on another device, meta included, or in another dtype; not copied."""
        # A narrower dtype rounds `value`, as it would round the elements of a dense tensor.
        value = float(torch.tensor(self.value, dtype=dtype, device="cpu"))
        return BasisTensor(self.content, value, self.shape, dtype, device)

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        about = f"dtype={self.dtype}, device={self.device}, value={self.value:.6g}"
        return f"BasisTensor({tuple(self.shape)}, {about})"

    def __reduce_ex__(self, protocol):
        parts = self.content, self.value, tuple(self.shape), self.dtype, self.device
        return BasisTensor, parts

    def __deepcopy__(self, memo: dict) -> "BasisTensor":
        return self  # constant, and copies of a model should share it

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, t, name = kwargs or {}, args[0], func.overloadpacket.__name__
        if name in ("detach", "alias", "clone"):
            return cls(t.content, t.value, t.shape, t.dtype, t.device)
        if name == "_to_copy":
            return t.moved(kwargs.get("device") or t.device, kwargs.get("dtype") or t.dtype)
        if (name.endswith("_") and isinstance(t, cls)) or isinstance(kwargs.get("out"), cls):
            raise RuntimeError(f"a basis is constant, but {func} would write to it")
        return func(*map(_dense, args), **{k: _dense(v) for k, v in kwargs.items()})


def _dense(argument: Any) -> Any:
    """An operator's argument with dense tensors for those of bases."""
    if isinstance(argument, (list, tuple)):
        return [_dense(each) for each in argument]
    return argument.dense() if isinstance(argument, BasisTensor) else argument
