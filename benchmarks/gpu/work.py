"""What a call of an operator gives its kernels to do, as far as their floors depend on it.

Letters as in docs/math.md. Activations, A', dW and what lies between are bf16, as kernels.py makes
them; lambda, gamma and sums are fp32. Sizes that only the card or the entries drawn decide are
taken at their expectation.
"""

from dataclasses import dataclass

from randlora_ext import TernaryBasis

from .floors import index_bytes

ELEMENT, SUM = 2, 4  # bytes
_CHUNK_BYTES = 64 << 20  # Device::chunk_bytes of csrc/core/device.h

Matrix = tuple[int, int]  # rows, columns


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Work:
    """`arguments` and `launches` are those of one kernel in the call, as the profiler names it."""

    basis: TernaryBasis
    tokens: int = 0
    backward: bool = False
    generated: tuple[Matrix, ...] = ()  # as bit planes
    listed: tuple[tuple[Matrix, bool], ...] = ()  # as lists; whether by column
    multiprocessors: int = 132
    arguments: tuple[str, ...] = ()  # of the kernel's template
    launches: float = 1.0

    @property
    def nnz_a(self) -> float:
        return self.basis.density * self.basis.r * self.basis.d

    @property
    def nnz_b(self) -> float:
        return self.basis.density * self.basis.D * self.basis.K

    @property
    def used(self) -> float:
        """The share of the columns k that some S_j has."""
        if self.basis.support == "balanced":
            return 1.0
        return 1 - (1 - self.basis.density) ** self.basis.r

    @property
    def a_lists(self) -> float:
        return self.nnz_a * index_bytes(self.basis) + 8 * (2 * self.basis.r + 1)

    @property
    def lam(self) -> float:
        return SUM * self.basis.r * self.basis.n

    @property
    def gam(self) -> float:
        return SUM * self.basis.n * self.basis.d

    # How linear.cu and a_support.cu cut the tokens.

    @property
    def chunk(self) -> int:
        """Tokens at a time on the factored path: V or U takes at most chunk_bytes."""
        return _whole_tiles(self.tokens, _CHUNK_BYTES // (self.basis.K * ELEMENT))

    @property
    def part(self) -> int:
        """Tokens of a chunk that the A side takes at a time."""
        return self._part_of(self.basis.d)

    @property
    def chunks(self) -> int:
        return ceil_div(self.tokens, self.chunk)

    @property
    def parts(self) -> int:
        """Of all chunks."""
        return self.parts_of(self.basis.d)

    def parts_of(self, features: int) -> int:
        """The same for a side that takes panels of so many features: d, or D of a balanced B."""
        last = self.tokens - (self.chunks - 1) * self.chunk
        part = self._part_of(features)
        return (self.chunks - 1) * ceil_div(self.chunk, part) + ceil_div(last, part)

    def _part_of(self, features: int) -> int:
        return _whole_tiles(self.chunk, _CHUNK_BYTES // 4 // (features * ELEMENT))


def _whole_tiles(tokens: int, most: int) -> int:
    return min(tokens, max(most // 128, 1) * 128)
