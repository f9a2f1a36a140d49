"""Generated bases: which matrices a seed gives (docs/basis-spec.md, docs/balanced-spec.md)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import generate_planes, signed_seed

_ops = torch.ops.randlora

# Non-zeros of A and B drawn one by one; or q in every column of A, and in any r columns of a row of
# B at the same places. The versions are those of the specification.
SPEC_VERSIONS = {"independent": 1, "balanced": 2}
_A, _B = 0, 1  # roles


@dataclass(frozen=True)
class Generated:
    """What decides the elements of A and B, whatever the layer's shape.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """

    seed: int
    density: float
    support: str
    r: int

    def __post_init__(self) -> None:
        density, support, r = self.density, self.support, self.r
        if isinstance(density, bool) or not isinstance(density, (int, float)):
            raise TypeError(f"density must be a number in (0, 1], got {density!r}")
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density must be in (0, 1], got {density}")
        if not isinstance(support, str) or support not in SPEC_VERSIONS:
            raise ValueError(f"support must be one of {[*SPEC_VERSIONS]}, got {support!r}")
        signed_seed("seed", self.seed)
        density = float(density)
        if support == "balanced":
            q = round(density * r)
            if q < 1 or not math.isclose(q, density * r, rel_tol=1e-9):
                below, above = max(1, math.floor(density * r)), math.floor(density * r) + 1
                near = " or ".join(f"{k}/{r} = {k / r!r}" for k in dict.fromkeys((below, above)))
                raise ValueError(
                    f"density={density!r} with support='balanced' and r={r} must be q / r for a "
                    f"whole number q of 1 to {r}: {near}, say"
                )
            density = q / r
        object.__setattr__(self, "density", density)

    def planes(self, role: int, rows: int, cols: int, device: torch.device) -> Tensor:
        """The first rows and columns of A (role 0; all r rows) or B (role 1) as bit planes."""
        if role == _A:
            return self.a_planes(0, cols, device)
        return self.b_planes(0, rows, cols // self.r, device)

    def a_planes(self, column: int, d: int, device: torch.device) -> Tensor:
        """Columns [column, column + d) of A as bit planes (2, r, ceil(d / 64))."""
        if self.support == "independent":
            return generate_planes(self.seed, _A, 0, self.r, column, d, self.density, device)
        packed = self._balanced(_A, column, d, 1, True, device)
        turned = _ops.balanced_to_planes(*packed, d, 1)  # (2, d, ceil(r / 64))
        A = _ops.planes_to_dense(turned, self.r, 1.0, torch.float32).T
        return _ops.pack_dense(A.contiguous())[0]

    def b_planes(self, row: int, D: int, n: int, device: torch.device) -> Tensor:
        """Rows [row, row + D) of B for n bases as bit planes (2, D, ceil(r * n / 64))."""
        if self.support == "independent":
            return generate_planes(self.seed, _B, row, D, 0, self.r * n, self.density, device)
        packed = self._balanced(_B, row, D, n, True, device)
        return _ops.balanced_to_planes(*packed, D, n)

    def b_balanced(
        self, row: int, D: int, n: int, wide: bool, device: torch.device
    ) -> list[Tensor]:
        """The same rows of a balanced B by group: [offset, row, sign]."""
        return self._balanced(_B, row, D, n, wide, device)

    def _balanced(
        self, role: int, line: int, lines: int, n: int, wide: bool, device: torch.device
    ) -> list[Tensor]:
        q = round(self.density * self.r)
        index, bits = (torch.int32 if wide else torch.int16), torch.int32
        offset = torch.empty(self.r + 1, dtype=torch.int64, device=device)
        row = torch.empty(lines * q, dtype=index, device=device)
        sign = torch.empty(lines * q, -(-n // 32), dtype=bits, device=device)
        _ops.fill_balanced_(offset, row, sign, signed_seed("seed", self.seed), role, line, q, n)
        return [offset, row, sign]
