"""Basis specifications version 1 and hadamard-1 in NumPy: docs/basis-spec.md as code.

Written for reading, not speed: every element runs its own Philox call. Everything else that makes a
basis (compiled CPU kernels, CUDA kernels) must agree with `ternary` and `hadamard` bit for bit.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

SPEC_VERSION = 1
ROLE_A, ROLE_B = 0, 1
ROLE_FEATURES, ROLE_ROWS, ROLE_COLUMNS = 3, 4, 5  # the signs of Hadamard bases
MASK, SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32_10(counter: ArrayLike, key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10 (Salmon et al., SC'11): counters (..., 4) and one key to words (..., 4)."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2  # 64-bit products
        c0, c1 = (p1 >> SHIFT) ^ c1 ^ np.uint64(k0), p1 & MASK
        c2, c3 = (p0 >> SHIFT) ^ c3 ^ np.uint64(k1), p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def threshold(density: float) -> int:
    """How many of the 2^32 words give +1; the same number gives -1."""
    return max(1, math.floor(density * 2.0**31 + 0.5))


def ternary(
    seed: int, role: int, rows: ArrayLike, cols: ArrayLike, density: float
) -> NDArray[np.int8]:
    """Elements -1, 0, +1 at `rows` and `cols`, two index arrays that broadcast."""
    row, col = np.broadcast_arrays(*(np.asarray(index, dtype=np.uint64) for index in (rows, cols)))
    block = (col >> np.uint64(6)) * np.uint64(16) + (col & np.uint64(15))
    constant = np.ones_like(row)
    counter = np.stack([block, row, constant * np.uint64(role), constant * SPEC_VERSION], axis=-1)
    words = philox4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32))
    word = (col >> np.uint64(4)) & np.uint64(3)
    u = np.take_along_axis(words, word[..., None].astype(np.int64), axis=-1)[..., 0]
    t = np.uint32(threshold(density))
    return (u < t).astype(np.int8) - (u - t < t).astype(np.int8)  # uint32 subtraction wraps


def signs(seed: int, role: int, first: int, count: int) -> NDArray[np.int8]:
    """`count` elements, from `first` on, of the sequence of signs of that role."""
    return ternary(seed, role, 0, np.arange(first, first + count, dtype=np.uint64), 1.0)


def sylvester(rows: int, columns: int) -> NDArray[np.int8]:
    """The leading part (rows, columns) of Sylvester's Hadamard matrix."""
    H = np.ones((1, 1), dtype=np.int8)
    while len(H) < max(rows, columns):
        H = np.block([[H, H], [H, -H]])
    return H[:rows, :columns]


def hadamard(
    in_features: int, out_features: int, r: int, seed: int
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Specification hadamard-1: A (r, d) and B (D, K) of a whole layer."""
    d, D = sorted((in_features, out_features))
    n = -(-d // r)
    a_signs = signs(seed, ROLE_FEATURES, 0, d)
    row_signs = signs(seed, ROLE_ROWS, 0, D)
    col_signs = signs(seed, ROLE_COLUMNS, 0, r * n)
    A = a_signs * sylvester(r, r)[:, np.arange(d) // n]
    return A, row_signs[:, None] * sylvester(D, r * n) * col_signs
