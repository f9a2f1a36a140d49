"""`TernaryTensor`: a tensor of values {-a, 0, +a} that is kept as bit planes, 2 bits an element.

PEFT holds its bases A and B as ordinary tensors, reads their shapes, moves them and saves them. A
tensor subclass lets it go on doing so while nothing dense is kept: shape, dtype, device and moves
cost nothing, and any other operation works on a dense copy that is made for it and dropped.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..basis.description import BasisDescription
from ..basis.generated import generate_planes
from ..basis.imported import pack_dense

_aten = torch.ops.aten
_ops = torch.ops.randlora


@dataclass(eq=False)  # identity: it is the key of what was made of it
class TernaryMatrix:
    """A ternary matrix (rows, cols), times `value`: bit planes, or what generates them."""

    rows: int
    cols: int
    value: float
    planes: Tensor | None  # (2, rows, ceil(cols / 64)) int64; None: not generated yet
    generated: BasisDescription | None = None
    role: int = 0  # of a generated basis: 0 is A, 1 is B
    # What layers made of it, by shape (bases.py); not part of the matrix.
    layers: dict = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> Tensor:
        """The planes on a device."""
        if self.planes is None:
            assert self.generated is not None
            span, g = (0, self.rows, 0, self.cols), self.generated
            self.planes = generate_planes(g.seed, self.role, *span, g.density, device)
        return self.planes.to(device)

    def equals(self, other: "TernaryMatrix") -> bool:
        """Whether it has the same elements; one that is not generated yet equals none."""
        return (
            (self.rows, self.cols, self.value) == (other.rows, other.cols, other.value)
            and self.planes is not None
            and other.planes is not None
            and torch.equal(self.planes, other.planes)
        )

    def with_value(self, value: float) -> "TernaryMatrix":
        if value == self.value:
            return self
        return TernaryMatrix(self.rows, self.cols, value, self.planes, self.generated, self.role)


class TernaryTensor(Tensor):
    """(rows, ...) with the trailing dims flattened into a `TernaryMatrix`'s columns."""

    matrix: TernaryMatrix

    @staticmethod
    def __new__(
        cls, matrix: TernaryMatrix, shape: tuple, dtype: torch.dtype, device: torch.device
    ) -> "TernaryTensor":
        self = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        self.matrix = matrix
        return self

    @classmethod
    def of(cls, dense: Tensor) -> "TernaryTensor":
        """Packs a dense tensor exactly. Raises ValueError where it is not ternary."""
        rows = dense.shape[0]
        planes, value = pack_dense("the basis", dense.detach().reshape(rows, -1))
        matrix = TernaryMatrix(rows, dense[0].numel(), value, planes)
        return cls(matrix, dense.shape, dense.dtype, dense.device)

    def dense(self) -> Tensor:
        """A new dense tensor with the same values."""
        m = self.matrix
        if self.device.type == "meta":
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        values = _ops.planes_to_dense(m.on(self.device), m.cols, m.value, self.dtype)
        return values.view(self.shape)

    def _moved(self, device: torch.device, dtype: torch.dtype) -> "TernaryTensor":
        # A narrower dtype rounds the one value that there is, as it would in a dense tensor.
        value = float(torch.tensor(self.matrix.value, dtype=dtype))
        return TernaryTensor(self.matrix.with_value(value), self.shape, dtype, device)

    def data_ptr(self) -> int:
        """That of the planes: equal for tensors that share them."""
        planes = self.matrix.planes
        return 0 if planes is None else planes.data_ptr()

    # These look for a storage, which a dispatched operator never does.

    def share_memory_(self) -> "TernaryTensor":
        self.matrix.on(torch.device("cpu")).share_memory_()
        return self

    def numpy(self, **options):
        return self.dense().numpy(**options)

    def __array__(self, *args, **options):
        return self.dense().__array__(*args, **options)

    def tolist(self) -> list:
        return self.dense().tolist()

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        return (
            f"TernaryTensor({tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"value={self.matrix.value:.6g})"
        )

    def __reduce_ex__(self, protocol):
        return TernaryTensor, (self.matrix, tuple(self.shape), self.dtype, self.device)

    def __deepcopy__(self, memo: dict) -> "TernaryTensor":
        return self  # constant, and copies of a model should share it

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default, _aten.clone.default):
            t = args[0]
            return cls(t.matrix, t.shape, t.dtype, t.device)
        if func is _aten._to_copy.default:
            t = args[0]
            return t._moved(
                torch.device(kwargs.get("device") or t.device), kwargs.get("dtype") or t.dtype
            )
        if func._schema.is_mutable and any(isinstance(a, cls) for a in args[:1]):
            raise RuntimeError(f"a TernaryTensor is constant, but {func} would write to it")
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.dense, (args, kwargs))
        return func(*args, **kwargs)
