"""Basis specification, version 2, in NumPy: docs/balanced-spec.md as code.

Written for reading, not speed. Everything else that makes a balanced basis must agree with it bit
for bit.
"""

import numpy as np
from basis_reference import ROLE_A, ROLE_B, philox4x32_10
from numpy.typing import NDArray

SPEC_VERSION = 2


def philox(seed: int, *counter) -> NDArray[np.uint32]:
    """Output words (..., 4) of counters (block, line, stream, version), which broadcast."""
    counters = np.stack(np.broadcast_arrays(*counter), axis=-1)
    return philox4x32_10(counters, (seed & 0xFFFFFFFF, seed >> 32))


def support(seed: int, role: int, line: int, r: int, q: int) -> NDArray[np.int64]:
    """The q groups of a line, ascending."""
    keys = philox(seed, np.arange(-(-r // 4)), line, role, SPEC_VERSION).ravel()[:r]
    return np.sort(np.argsort(keys, kind="stable")[:q])


def signs(seed: int, role: int, line: int, group: int, n: int, e: int = 0) -> NDArray[np.int8]:
    """Elements e .. e + n - 1 of a group in the line's support: +1 or -1."""
    element = np.arange(e, e + n, dtype=np.uint64)
    words = philox(seed, element >> np.uint64(7), line, 2 * group + 2 + role, SPEC_VERSION)
    word = (element >> np.uint64(5) & np.uint64(3)).astype(np.int64)
    bit = np.take_along_axis(words, word[:, None], axis=-1)[:, 0] >> (element & np.uint64(31))
    return (1 - 2 * (bit & np.uint64(1)).astype(np.int8)).astype(np.int8)


def lines(seed: int, role: int, line: int, count: int, r: int, q: int, n: int) -> NDArray[np.int8]:
    """Lines line .. line + count - 1 as elements (count, r * n); group c % r has element c // r."""
    values = np.zeros((count, n, r), dtype=np.int8)
    for row in range(count):
        for group in support(seed, role, line + row, r, q).tolist():
            values[row, :, group] = signs(seed, role, line + row, group, n)
    return values.reshape(count, r * n)


def matrices(seed: int, d: int, D: int, r: int, q: int, n: int):
    """Unscaled A (r, d), whose lines are its columns, and B (D, K)."""
    return lines(seed, ROLE_A, 0, d, r, q, 1).T, lines(seed, ROLE_B, 0, D, r, q, n)
