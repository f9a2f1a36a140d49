"""The least work of an operator: bytes through device memory, and operations by their unit.

Each input is read once and each result written once. What lies between (V, U, partial sums) could
stay on the chip and is not counted. Letters as in docs/math.md; activations, A' and dW have
`element` bytes (bf16: 2), lambda and gamma four. A multiply-add is two operations on the matrix
unit and one elsewhere. Nsight Compute tells what each kernel does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from randlora_ext import Basis

# Philox4x32-10 makes four elements: ten rounds of two 32 x 32 -> 64 bit products (two instructions
# each), four exclusive ors and two additions to the key.
INTEGERS_PER_ELEMENT = 10 * (2 * 2 + 4 + 2) / 4
# Of the slots in which a card issues instructions, those that a kernel can be expected to fill.
ISSUED = 0.7
# Between the starts of two kernels, beside their work.
LAUNCH_US = 1.0


@dataclass(frozen=True)
class Ceilings:
    """Rates of a card per second. Additions run at half the flop rate of fp32, integer operations
    at a quarter (64 of 128 lanes). An instruction of a warp takes the slot of 32 multiply-adds, and
    a wavefront of the pipe between a multiprocessor and its L1 and shared memory that of 128."""

    copy_bytes_per_s: float
    bf16_flop_per_s: float
    fp32_flop_per_s: float


@dataclass(frozen=True)
class Floor:
    bytes: float
    matrix: float = 0.0  # operations on matrix units, bf16
    fma: float = 0.0  # fp32 additions or multiply-adds
    integer: float = 0.0
    instructions: float = 0.0  # of warps, counted
    wavefronts: float = 0.0  # of L1 and shared memory together, counted

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(self.bytes + other.bytes, self.matrix + other.matrix, self.fma + other.fma,
                     self.integer + other.integer,
                     self.instructions + other.instructions,
                     self.wavefronts + other.wavefronts)  # fmt: skip

    def byte_us(self, rates: Ceilings) -> float:
        return self.bytes / rates.copy_bytes_per_s * 1e6

    def operation_us(self, rates: Ceilings) -> float:
        """The units work side by side: the slowest decides."""
        return 1e6 * max(
            self.matrix / rates.bf16_flop_per_s,
            self.fma / (rates.fp32_flop_per_s / 2),
            self.integer / (rates.fp32_flop_per_s / 4),
            self.instructions / (rates.fp32_flop_per_s / 64 * ISSUED),
            self.wavefronts / (rates.fp32_flop_per_s / 256),
        )

    def us(self, rates: Ceilings) -> float:
        return max(self.byte_us(rates), self.operation_us(rates))

    def beside(self, us: float, rates: Ceilings) -> dict[str, float]:
        return {"byte_us": self.byte_us(rates), "operation_us": self.operation_us(rates),
                "over_floor": us / self.us(rates)}  # fmt: skip


def planes_bytes(b: Basis) -> float:
    return 2 * b.D * -(-b.K // 64) * 8


def list_bytes(b: Basis, by_column: bool = False) -> float:
    lines = b.K if by_column else b.D
    return 2 * b.density * b.D * b.K + (2 * lines + 1) * 8


def packed_bytes(b: Basis) -> float:
    """B once, as one product reads it."""
    return list_bytes(b) if b.format == "lists" else planes_bytes(b)


def dense_bytes(b: Basis) -> float:
    return 2 * (b.D * b.K)


def small_bytes(b: Basis) -> float:
    """A (lists), lambda and gamma."""
    return 2 * b.density * b.r * b.d + 4 * (b.r * b.n + b.n * b.d)


def fill_planes(b: Basis) -> Floor:
    return Floor(planes_bytes(b), integer=INTEGERS_PER_ELEMENT * (b.D * b.K))


def planes_to_lists(b: Basis, by_column: bool) -> Floor:
    return Floor(planes_bytes(b) + list_bytes(b, by_column))


def planes_to_dense(b: Basis) -> Floor:
    return Floor(planes_bytes(b) + dense_bytes(b))


def whole_basis(b: Basis) -> Floor:
    """From the seed to the packed form."""
    if b.kind == "hadamard":
        signs = b.d + b.D + b.K
        return Floor(4 * signs, integer=INTEGERS_PER_ELEMENT * signs)
    lists = list_bytes(b) + list_bytes(b, True)
    written = lists if b.format == "lists" else planes_bytes(b)
    return Floor(written, integer=INTEGERS_PER_ELEMENT * (b.D * b.K))


def scaled_basis(b: Basis, element: int = 2) -> Floor:
    """A' (K, d) written; backward reads its gradient instead, and multiplies twice."""
    moved = element * (b.K + b.r) * b.d + 4 * (b.r * b.n + b.n * b.d)
    return Floor(moved, fma=b.K * b.d)


def independent(b: Basis, tokens: int, element: int = 2) -> tuple[Floor, Floor]:
    """Forward and backward of the adapter: x read, y written, a product with either side.

    Backward: x and dy read, dx and the diagonals' gradients written; two products with A, and with
    B one if d == in, otherwise two. A product with B: a GEMM on decoded planes, additions from
    lists.
    """
    a_side = Floor(0, matrix=2 * b.density * b.K * b.d * tokens)
    if b.format == "lists":
        b_side = Floor(list_bytes(b), fma=b.density * b.D * b.K * tokens)
    else:
        b_side = Floor(planes_bytes(b), matrix=2 * (b.D * b.K) * tokens)
    x, y = (element * tokens * size for size in (b.in_features, b.out_features))
    gradients = Floor(4 * (b.r * b.n + b.n * b.d))
    forward = Floor(x + y + small_bytes(b)) + a_side + b_side
    backward = Floor(x) + forward + gradients + a_side
    return forward, backward if b.d == b.in_features else backward + b_side


def hadamard_kernels(
    b: Basis,
    tokens: int,
    element: int = 2,
    counted: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> tuple[list[Floor], list[Floor]]:
    """Forward and backward of the adapter on Hadamard bases, kernel by kernel, with the
    instructions and wavefronts of each as `counted`.

    The class products read or write a (T, d) tensor and z or w (T, K); the transform writes y, to
    which the frozen layer's product adds. Additions: log2 r + log2 N for each of K and N numbers.
    """
    x, y, z = (element * tokens * size for size in (b.d, b.D, b.K))
    N = 1 << (b.K - 1).bit_length()
    adds = tokens * (b.K * (b.r - 1).bit_length() + N * (N.bit_length() - 1))
    longest = -(-tokens // 512)  # slot, for the gradient of lambda
    sums = 4 * -(-tokens // longest) * b.K

    def kernel(name: str, moved: float, fma: float = 0) -> Floor:
        return Floor(moved, fma=fma, **counted.get(name, {}))

    gamma = kernel("gamma", (4 + element) * b.n * b.d)
    product = Floor(x + z, matrix=2 * tokens * b.K * b.n)
    up = kernel("up", z + y, adds)
    down = kernel("down_with_sums", y + 2 * z + sums, adds + tokens * b.K * (b.r - 1).bit_length())
    diagonals = kernel("diagonals", (4 + element) * b.n * b.d + sums)
    if b.expand:
        return [gamma, product, up], [gamma, product, down, product, product, diagonals]
    forward = [gamma, kernel("down", y + z, adds), product]
    return forward, [gamma, product, up, down, product, diagonals]


def hadamard(b: Basis, tokens: int, element: int = 2) -> tuple[Floor, Floor]:
    forward, backward = hadamard_kernels(b, tokens, element)
    return sum(forward, Floor(0)), sum(backward, Floor(0))


def best_lora(n_in: int, n_out: int, tokens: int, rank: int) -> tuple[list[Floor], list[Floor]]:
    """Forward and backward of LoRA in bf16 by six products, of which those that make y and dx add
    to what is there."""
    x, y = 2 * tokens * n_in, 2 * tokens * n_out
    of_in, of_out = (Floor(0, matrix=2 * tokens * rank * size) for size in (n_in, n_out))
    forward = [of_in + Floor(x), of_out + Floor(2 * y)]
    backward = [of_out + Floor(y), of_out + Floor(y), of_in + Floor(x), of_in + Floor(2 * x)]
    return forward, backward


def peft_lora(
    n_in: int, n_out: int, tokens: int, rank: int, element: int
) -> tuple[list[Floor], list[Floor]]:
    """The kernels that PEFT's LoRA lets torch start beside the frozen layer's, whose dtype is bf16.
    The adapter's numbers have `element` bytes: 2, or 4, PEFT's default, which casts."""
    x, y = tokens * n_in, tokens * n_out

    def product(numbers: int) -> Floor:
        if element == 2:
            return Floor(element * numbers, matrix=2 * rank * numbers)
        return Floor(element * numbers, fma=rank * numbers)

    scaled = Floor(2 * element * y)
    forward = [product(x), product(y), scaled, Floor((2 + 2 * element) * y)]  # the last adds
    backward = [scaled, product(y), product(y), product(x), product(x), Floor(6 * x)]
    if element == 2:
        return forward, backward
    to_x, to_y = Floor(6 * x), Floor(6 * y)  # casts
    return [to_x, *forward, to_y], [to_y, to_y, *backward, to_x]


def hadamard_weight(b: Basis, element: int = 2) -> Floor:
    """W read, W + dW written, log2 N additions an element."""
    N = 1 << (b.K - 1).bit_length()
    return Floor(2 * element * b.D * b.d, fma=b.d * N * (N.bit_length() - 1))


def hadamard_weight_backward(b: Basis, element: int = 2) -> Floor:
    """The gradient of W + dW read, those of lambda and gamma written; the transform, and two
    multiply-adds for each of K numbers a column."""
    N = 1 << (b.K - 1).bit_length()
    small = 4 * (b.r * b.n + b.n * b.d)
    return Floor(element * b.D * b.d + 2 * small, fma=b.d * (N * (N.bit_length() - 1) + 2 * b.K))
