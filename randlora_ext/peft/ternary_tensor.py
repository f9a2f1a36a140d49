"""`TernaryTensor`: a tensor of values {-a, 0, +a} kept as bit planes, 2 bits an element.

PEFT holds its bases A and B as ordinary tensors, reads their shapes, moves and saves them. A tensor
subclass allows this: shape, dtype, device and moves cost nothing, and any other operation works
on a dense copy that is made for it and dropped.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..basis import BasisDescription
from ..basis.ternary import generate_planes, pack_dense


@dataclass(eq=False)  # by identity: signs are the keys of what is made from them
class Signs:
    """The signs of a ternary matrix (rows, cols): bit planes, or what generates them."""

    rows: int
    cols: int
    planes: Tensor | None  # (2, rows, ceil(cols / 64)) int64; None: not generated yet
    description: BasisDescription | None = None
    role: int = 0  # of a generated matrix: 0 is A, 1 is B

    def on(self, device: torch.device) -> Tensor:
        """The planes on a device. Raises RuntimeError for Hadamard bases, as `dense`."""
        if self.planes is None:
            assert self.description is not None
            if self.description.kind == "hadamard":
                raise RuntimeError(
                    "randlora_A and randlora_B of Hadamard bases have no dense form: layers of "
                    "different shape have different matrices, which "
                    "layer.basis_of(adapter, device).dense() gives"
                )
            seed, density = self.description.seed, self.description.density
            assert density is not None
            span = 0, self.rows, 0, self.cols
            self.planes = generate_planes(seed, self.role, *span, density, device)
        return self.planes.to(device)


class TernaryTensor(Tensor):
    """(rows, ...), with the trailing dims flattened into the columns of `Signs`, times `value`."""

    signs: Signs
    value: float

    @staticmethod
    def __new__(cls, signs: Signs, value: float, shape, dtype, device) -> "TernaryTensor":
        self = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        self.signs, self.value = signs, value
        return self

    @classmethod
    def of(cls, dense: Tensor) -> "TernaryTensor":
        """Packs a dense tensor exactly. Raises ValueError if it is not ternary."""
        rows = dense.shape[0]
        planes, value = pack_dense("the basis", dense.detach().reshape(rows, -1))
        signs = Signs(rows, dense[0].numel(), planes)
        return cls(signs, value, dense.shape, dense.dtype, dense.device)

    @classmethod
    def generated(cls, description: BasisDescription, role: int, shape) -> "TernaryTensor":
        """A (role 0) or B (role 1) of a description; elements are made on demand."""
        signs = Signs(shape[0], math.prod(shape[1:]), None, description, role)
        density = 1.0 if description.density is None else description.density
        return cls(signs, 1 / math.sqrt(density), shape, torch.float32, "cpu")

    @property
    def is_hadamard(self) -> bool:
        """Whether layers of different shape have different matrices, not slices of this one."""
        return self.signs.description is not None and self.signs.description.kind == "hadamard"

    def dense(self) -> Tensor:
        """A new dense tensor with the same values. Raises RuntimeError for Hadamard bases."""
        if self.is_meta and not self.is_hadamard:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        planes = self.signs.on(self.device)
        make = torch.ops.randlora.planes_to_dense
        return make(planes, self.signs.cols, self.value, self.dtype).view(self.shape)

    def moved(self, device: torch.device | str, dtype: torch.dtype) -> "TernaryTensor":
        """The same elements on another device, meta included, or in another dtype; not copied."""
        # A narrower dtype rounds `value`, as it would round the elements of a dense tensor.
        value = float(torch.tensor(self.value, dtype=dtype, device="cpu"))
        return TernaryTensor(self.signs, value, self.shape, dtype, device)

    def data_ptr(self) -> int:
        """That of the planes: equal for tensors that share them."""
        return 0 if self.signs.planes is None else self.signs.planes.data_ptr()

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        about = f"dtype={self.dtype}, device={self.device}, value={self.value:.6g}"
        return f"TernaryTensor({tuple(self.shape)}, {about})"

    def __reduce_ex__(self, protocol):
        parts = self.signs, self.value, tuple(self.shape), self.dtype, self.device
        return TernaryTensor, parts

    def __deepcopy__(self, memo: dict) -> "TernaryTensor":
        return self  # constant, and copies of a model should share it

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, t, name = kwargs or {}, args[0], func.overloadpacket.__name__
        if name in ("detach", "alias", "clone"):
            return cls(t.signs, t.value, t.shape, t.dtype, t.device)
        if name == "_to_copy":
            return t.moved(kwargs.get("device") or t.device, kwargs.get("dtype") or t.dtype)
        if (name.endswith("_") and isinstance(t, cls)) or isinstance(kwargs.get("out"), cls):
            raise RuntimeError(f"a TernaryTensor is constant, but {func} would write to it")
        return func(*map(_dense, args), **{k: _dense(v) for k, v in kwargs.items()})


def _dense(argument: Any) -> Any:
    """An operator's argument with dense tensors for ternary ones."""
    if isinstance(argument, (list, tuple)):
        return [_dense(each) for each in argument]
    return argument.dense() if isinstance(argument, TernaryTensor) else argument
