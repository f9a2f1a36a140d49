"""The least work of an operator: bytes through device memory, and operations by their unit.

Each input is read once and each output written once; what lies between (V, U, partial sums) could
stay on the chip and is not counted. Letters as in docs/math.md; activations, A' and dW of `element`
bytes (bf16: 2), lambda and gamma in fp32. A multiply-add counts as two operations on the matrix
unit, as one elsewhere.
"""

from dataclasses import dataclass

from randlora_ext import TernaryBasis

# Philox4x32-10 makes four elements: ten rounds of two 32 x 32 -> 64 bit products (two instructions
# each), four exclusive ors and two additions to the key.
INTEGERS_PER_ELEMENT = 10 * (2 * 2 + 4 + 2) / 4


@dataclass(frozen=True)
class Floor:
    bytes: float
    matrix: float = 0.0  # operations on matrix units, bf16
    fma: float = 0.0  # fp32 additions or multiply-adds
    integer: float = 0.0

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(self.bytes + other.bytes, self.matrix + other.matrix, self.fma + other.fma,
                     self.integer + other.integer)  # fmt: skip

    def byte_us(self, ceilings: dict) -> float:
        return self.bytes / ceilings["copy_bytes_per_s"] * 1e6

    def operation_us(self, ceilings: dict) -> float:
        """The units work side by side: the slowest decides."""
        return 1e6 * max(
            self.matrix / ceilings["bf16_flop_per_s"],
            self.fma / ceilings["fma_per_s"],
            self.integer / ceilings["integer_per_s"],
        )


def index_bytes(b: TernaryBasis) -> int:
    return 4 if max(b.D, b.K) > 65536 else 2


def planes_of(rows: int, columns: int) -> float:
    return 2 * rows * -(-columns // 64) * 8


def planes_bytes(b: TernaryBasis) -> float:
    return planes_of(b.D, b.K)


def list_bytes(b: TernaryBasis, by_column: bool = False) -> float:
    lines = b.K if by_column else b.D
    return b.density * b.D * b.K * index_bytes(b) + (2 * lines + 1) * 8


def balanced_of(b: TernaryBasis, lines: int, n: int) -> float:
    """Rows, signs and offsets of a balanced matrix, which may be A."""
    entry = index_bytes(b) + 4 * -(-n // 32)
    return b.density * b.r * lines * entry + 8 * (b.r + 1)


def balanced_bytes(b: TernaryBasis) -> float:
    return balanced_of(b, b.D, b.n)


def packed_bytes(b: TernaryBasis) -> float:
    """B once, as one product reads it."""
    return {"planes": planes_bytes, "lists": list_bytes, "balanced": balanced_bytes}[b.format](b)


def dense_bytes(b: TernaryBasis) -> float:
    return 2 * b.D * b.K


def small_bytes(b: TernaryBasis) -> float:
    """The lists of A, lambda and gamma."""
    return b.density * b.r * b.d * index_bytes(b) + 4 * (b.r * b.n + b.n * b.d)


def fill_planes(b: TernaryBasis) -> Floor:
    return Floor(planes_bytes(b), integer=INTEGERS_PER_ELEMENT * b.D * b.K)


def planes_to_lists(b: TernaryBasis, by_column: bool) -> Floor:
    return Floor(planes_bytes(b) + list_bytes(b, by_column))


def expansion(b: TernaryBasis) -> Floor:
    """Planes or lists to the dense B, and back."""
    return Floor(packed_bytes(b) + dense_bytes(b))


def whole_basis(b: TernaryBasis) -> Floor:
    """From nothing to the packed form."""
    if b.format == "balanced":  # a call of Philox for 4 keys, or for 128 signs
        calls = (b.D + b.d) * -(-b.r // 4) + b.density * b.r * (b.D * -(-b.n // 128) + b.d)
        return Floor(balanced_bytes(b), integer=4 * INTEGERS_PER_ELEMENT * calls)
    lists = list_bytes(b) + list_bytes(b, True)
    written = planes_bytes(b) if b.format == "planes" else lists
    return Floor(written, integer=INTEGERS_PER_ELEMENT * b.D * b.K)


def scaled_basis(b: TernaryBasis, element: int = 2) -> Floor:
    """A' (K, d) written; backward reads its gradient instead."""
    return Floor(element * (b.K + b.r) * b.d + 4 * (b.r * b.n + b.n * b.d))


def delta_weight(b: TernaryBasis, element: int = 2) -> Floor:
    """dW written; backward reads its gradient instead, and contracts with as many terms.

    Lists: density^2 * K additions an entry. Planes, which a balanced B becomes: a product of (D, K)
    and (K, d).
    """
    move = Floor(element * b.D * b.d + packed_bytes(b) + small_bytes(b))
    if b.format != "lists":
        return move + Floor(0, matrix=2 * b.D * b.K * b.d)
    return move + Floor(0, fma=b.density**2 * b.K * b.D * b.d)


def a_side(b: TernaryBasis, tokens: int) -> Floor:
    return Floor(0, matrix=2 * b.density * b.K * b.d * tokens)


def b_side(b: TernaryBasis, tokens: int, dense: bool) -> Floor:
    """One product with B: a GEMM on the dense one, on decoded planes or on the rows of a balanced
    one's groups, additions from lists."""
    if dense:
        return Floor(dense_bytes(b), matrix=2 * b.D * b.K * tokens)
    if b.format == "planes":
        return Floor(planes_bytes(b), matrix=2 * b.D * b.K * tokens)
    if b.format == "balanced":
        return Floor(balanced_bytes(b), matrix=2 * b.density * b.D * b.K * tokens)
    return Floor(list_bytes(b), fma=b.density * b.D * b.K * tokens)


def linear(b: TernaryBasis, tokens: int, dense: bool, element: int = 2) -> Floor:
    """The adapter alone, factored: x read, y written, a product with either side."""
    move = Floor(element * tokens * (b.in_features + b.out_features) + small_bytes(b))
    return move + a_side(b, tokens) + b_side(b, tokens, dense)


def linear_backward(b: TernaryBasis, tokens: int, dense: bool, element: int = 2) -> Floor:
    """x and dy read, dx written; two products with A. With B one where d == in, two otherwise."""
    move = Floor(element * tokens * (2 * b.in_features + b.out_features) + small_bytes(b))
    move += Floor(4 * (b.r * b.n + b.n * b.d))  # their gradients
    work = move + a_side(b, tokens) + a_side(b, tokens) + b_side(b, tokens, dense)
    return work if b.d == b.in_features else work + b_side(b, tokens, dense)
