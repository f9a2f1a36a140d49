"""Imported matrices: dense ternary A and B packed exactly, or bit planes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .shape import Shape
from .ternary_matrices import TernaryMatrices

_ops = torch.ops.randlora


@dataclass(frozen=True, eq=False)  # compared by identity: comparing elements would be slow
class ImportedMatrices(TernaryMatrices):
    """A and B of one layer as bit planes, with the values that +1 stands for."""

    planes_of_a: Tensor  # (2, r, ceil(d / 64))
    a_value: float
    planes_of_b: Tensor  # (2, D, ceil(K / 64))
    b_value: float
    density: float  # share of non-zeros of B, which decides the packed format and predicted cost

    kind = "imported"
    description = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", self.a_value * self.b_value)

    @classmethod
    def of(
        cls, a_planes: Tensor, b_planes: Tensor, a_value: float, b_value: float, shape: Shape
    ) -> "ImportedMatrices":
        """As `TernaryBasis.from_planes`."""
        parts = []
        for name, planes, rows, cols in (
            ("a_planes", a_planes, shape.r, shape.d),
            ("b_planes", b_planes, shape.D, shape.K),
        ):
            words = -(-cols // 64)
            if planes.dtype != torch.int64:
                raise ValueError(f"{name} must be int64, got {planes.dtype}")
            size = tuple(planes.shape)
            if len(size) != 3 or size[0] != 2 or size[1] < rows or size[2] < words:
                raise ValueError(f"{name} must be (2, >= {rows}, >= {words}), got {size}")
            part = leading(planes, rows, cols)
            if bool((part[0] & part[1]).any()):
                raise ValueError(
                    f"{name} has elements that are +1 and -1 at once; its two planes must not "
                    "share a bit"
                )
            parts.append(part)
        a, b = parts
        return cls(a, a_value, b, b_value, _share_of_non_zeros(b, shape))

    def a_planes(self, shape: Shape, device: torch.device) -> Tensor:
        return _columns(self.planes_of_a, shape.first_column, shape.d).to(device)

    def b_planes(self, shape: Shape, device: torch.device) -> Tensor:
        return leading(self.planes_of_b[:, shape.first_row :], shape.D, shape.K).to(device)


def _columns(planes: Tensor, first: int, count: int) -> Tensor:
    """The planes of `count` columns from `first`."""
    word, shift = divmod(first, 64)
    part = planes[:, :, word:]
    if shift:
        upper = part[:, :, 1:] << (64 - shift)
        part = (part >> shift) & ((1 << (64 - shift)) - 1)  # >> repeats the sign bit
        part[:, :, :-1] |= upper
    return leading(part, planes.shape[1], count)


def _share_of_non_zeros(planes: Tensor, shape: Shape) -> float:
    # Eight bits at a time by a table: torch has no population count.
    ones = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64)
    counts = torch.bincount(planes.cpu().view(torch.uint8).flatten(), minlength=256)
    return max(int(counts @ ones) / (shape.D * shape.K), 2.0**-31)


def pack_layer(
    A: Tensor, B: Tensor, in_features: int, out_features: int
) -> tuple[Tensor, Tensor, float, float]:
    """Planes and values of A and B, which are given as `TernaryBasis.from_ternary` takes them."""
    A, B = A.detach(), B.detach()
    if A.dim() == 3 and A.shape[1] == 1:
        A = A.flatten(1)
    if A.dim() != 2 or len(A) == 0:
        raise ValueError(f"A must be (r, d) or (r, 1, d), got {tuple(A.shape)}")
    shape = Shape.of(in_features, out_features, len(A))
    if A.shape[1] < shape.d:
        raise ValueError(f"A must have at least d = {shape.d} columns, got {tuple(A.shape)}")
    if B.dim() == 3:
        if B.shape[0] < shape.D or B.shape[1] < shape.n or B.shape[2] != shape.r:
            raise ValueError(
                f"B must be (>= D, >= n, r) = (>= {shape.D}, >= {shape.n}, {shape.r}), "
                f"got {tuple(B.shape)}"
            )
        B = B[: shape.D, : shape.n].flatten(1)
    elif tuple(B.shape) != (shape.D, shape.K):
        raise ValueError(
            f"B must be (D, K) = ({shape.D}, {shape.K}) or (D, n, r), got {tuple(B.shape)}"
        )
    (a, a_value), (b, b_value) = pack_dense("A", A[:, : shape.d]), pack_dense("B", B)
    return a, b, a_value, b_value


def pack_dense(name: str, matrix: Tensor) -> tuple[Tensor, float]:
    """Bit planes of `matrix` and the value of +1; ValueError if `matrix` is not ternary."""
    if not matrix.is_floating_point():
        raise ValueError(f"{name} must be a floating point matrix, got {matrix.dtype}")
    try:
        planes, value = _ops.pack_dense(matrix.cpu())
    except RuntimeError as error:
        message = str(error).splitlines()[0].split("randlora: ")[-1]
        if not message.startswith("dense "):
            raise  # no fault of the matrix: memory ran out
        raise ValueError(f"{name} cannot be packed: {message}") from error
    return planes, float(value)


def leading(planes: Tensor, rows: int, cols: int) -> Tensor:
    """The planes of the first `rows` rows and `cols` columns; `planes` itself if that is all."""
    words = -(-cols // 64)
    part = planes[:, :rows, :words].contiguous()
    if cols % 64:  # bits past the last column are zero
        outside = ~((1 << cols % 64) - 1)
        if bool((part[:, :, -1] & outside).any()):
            part = part.clone() if part.data_ptr() == planes.data_ptr() else part
            part[:, :, -1] &= ~outside
    return part
