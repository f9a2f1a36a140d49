"""Ternary bases of somebody else: dense matrices packed exactly, or bit planes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .shape import Shape

_ops = torch.ops.randlora


@dataclass(frozen=True, eq=False)  # identity: comparing megabytes would be no cheap `==`
class Imported:
    """Dense ternary bases of somebody else, as bit planes with the value of their +1."""

    a_planes: Tensor
    a_value: float
    b_planes: Tensor
    b_value: float

    @classmethod
    def of(cls, A: Tensor, B: Tensor, shape: Shape) -> "Imported":
        """Packs A (r, >= d) and B (D, K) or (>= D, >= n, r).

        Raises ValueError where one is too small or not ternary.
        """
        if A.shape[1] < shape.d:
            raise ValueError(f"A must have at least d = {shape.d} columns, got {tuple(A.shape)}")
        B = B.detach()
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
        return cls(*pack_dense("A", A[:, : shape.d]), *pack_dense("B", B))

    @classmethod
    def of_planes(
        cls, a_planes: Tensor, b_planes: Tensor, a_value: float, b_value: float, shape: Shape
    ) -> "Imported":
        """The first d columns of A, D rows and K columns of B. ValueError where they are fewer."""
        for name, planes, rows, cols in (
            ("a_planes", a_planes, shape.r, shape.d),
            ("b_planes", b_planes, shape.D, shape.K),
        ):
            words = -(-cols // 64)
            if planes.dim() != 3 or planes.shape[1] < rows or planes.shape[2] < words:
                raise ValueError(
                    f"{name} must be (2, >= {rows}, >= {words}), got {tuple(planes.shape)}"
                )
        a, b = leading(a_planes, shape.r, shape.d), leading(b_planes, shape.D, shape.K)
        return cls(a, a_value, b, b_value)

    def count_b(self) -> int:
        """Non-zeros of B."""
        # Eight bits at a time by a table: torch has no population count.
        ones = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64)
        counts = torch.bincount(self.b_planes.cpu().view(torch.uint8).flatten(), minlength=256)
        return int(counts @ ones)


def pack_dense(name: str, matrix: Tensor) -> tuple[Tensor, float]:
    """Bit planes of a ternary (rows, cols) and the value of its +1; ValueError where it is none."""
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
