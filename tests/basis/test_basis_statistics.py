"""The generated matrices look random: density, signs, and independence, by chi-square tests.

Seeds are fixed. The probability of a statistic at least as large must lie in (ALPHA, 1 - ALPHA):
neither too irregular nor too regular. Probabilities come from the integer threshold, none is
estimated, so a table of k cells has k - 1 degrees of freedom.
"""

import math

import numpy as np
import pytest
from basis_reference import ROLE_A, ROLE_B, ROLE_COL, ROLE_ROW, ROLE_S, threshold
from basis_vectors import from_planes

from randlora_ext.basis.ternary import generate_planes

ALPHA = 1e-4
SEED = 2025
SIDE = 1024  # about a million elements a sample
DENSITIES = pytest.mark.parametrize("density", [1 / 3, 0.07, 1 / 64], ids=["1/3", "0.07", "1/64"])


def sample(density: float, role: int = ROLE_B, seed: int = SEED):
    return from_planes(generate_planes(seed, role, 0, SIDE, 0, SIDE, density).numpy(), SIDE)


def plausible(statistic: float, degrees: int) -> bool:
    """By P(chi-square >= statistic), the finite sum that an even number of degrees has."""
    assert degrees % 2 == 0
    half = statistic / 2
    logs = [k * math.log(half) - math.lgamma(k + 1) - half for k in range(degrees // 2)]
    return ALPHA < math.fsum(map(math.exp, logs)) < 1 - ALPHA


def probabilities(density: float):
    """Of -1, 0 and +1."""
    t = threshold(density) / 2**32
    return np.array([t, 1 - 2 * t, t])


def pearson(observed, expected) -> float:
    assert expected.min() >= 5 and np.isclose(observed.sum(), expected.sum())
    return ((observed - expected) ** 2 / expected).sum()


def has_density(values, density: float) -> bool:
    observed = np.bincount(np.ravel(values) + 1, minlength=3)
    return plausible(pearson(observed, probabilities(density) * values.size), 2)


def independent(first, second, density: float) -> bool:
    """By the 3 x 3 table of two samples taken element by element; no element may occur twice."""
    pairs = 3 * (np.ravel(first) + 1) + np.ravel(second) + 1
    expected = np.outer(*[probabilities(density)] * 2).ravel() * pairs.size
    return plausible(pearson(np.bincount(pairs, minlength=9), expected), 8)


@DENSITIES
def test_density_and_signs(density):
    values = sample(density)
    assert has_density(values, density) and has_density(sample(density, ROLE_A), density)
    assert not has_density(values, 1.05 * density)
    # Each of the 64 columns of a group is its own (counter, word); a lane gone wrong shows here.
    lanes = [np.ravel(values[:, lane::64]) + 1 for lane in range(64)]
    observed = np.array([np.bincount(lane, minlength=3) for lane in lanes])
    expected = np.tile(probabilities(density) * lanes[0].size, (64, 1))
    assert plausible(pearson(observed, expected), 2 * 64)  # each lane's total is fixed
    # The variance of the number of non-zeros; correlation anywhere within a line would change it.
    p = 2 * threshold(density) / 2**32
    for axis in (0, 1):
        counts = np.count_nonzero(values, axis=axis)
        assert plausible(((counts - SIDE * p) ** 2).sum() / (SIDE * p * (1 - p)), SIDE)


@DENSITIES
def test_roles_neighbours_and_seeds_are_independent(density):
    values = sample(density)
    for role in (ROLE_A, ROLE_S, ROLE_ROW, ROLE_COL):
        assert independent(values, sample(density, role), density), role
    assert independent(values[0::2], values[1::2], density)
    # Distance 16 and 32: the same counter, another output word. 64: the same word, another group.
    for distance in (1, 16, 32, 64):
        pairs = values.reshape(SIDE, -1, 2, distance)
        assert independent(pairs[:, :, 0], pairs[:, :, 1], density), distance
    for seed in (SEED + 1, SEED + 2**32, SEED + 2**63):
        assert independent(values, sample(density, seed=seed), density), seed
