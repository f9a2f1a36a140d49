"""The generated matrices look random: density, signs, and independence, by chi-square tests.

Every test uses fixed seeds and so always gives the same answer. One asks that the probability of a
statistic at least as large lies within (ALPHA, 1 - ALPHA): neither too irregular nor too regular.
The null hypothesis is complete (probabilities come from the integer threshold, none is estimated),
so a table of k cells has k - 1 degrees of freedom.
"""

import math
from functools import cache

import numpy as np
import pytest
from basis_reference import ROLE_A, ROLE_B, ternary, threshold

ALPHA = 1e-4
SEED = 2025
SIDE = 1024  # about a million elements a sample
DENSITIES = pytest.mark.parametrize("density", [1 / 3, 0.07, 1 / 64], ids=["1/3", "0.07", "1/64"])


@cache
def sample(density: float, role: int = ROLE_B, seed: int = SEED):
    rows, cols = np.arange(SIDE)[:, None], np.arange(SIDE)
    values = ternary(seed, role, rows, cols, density)
    values.setflags(write=False)
    return values


def tail(statistic: float, degrees: int) -> float:
    """P(chi-square >= statistic), by the finite sum that an even number of degrees has."""
    assert degrees % 2 == 0
    half = statistic / 2
    logs = [k * math.log(half) - math.lgamma(k + 1) - half for k in range(degrees // 2)]
    return math.fsum(map(math.exp, logs))


def probabilities(density: float):
    """Of -1, 0 and +1."""
    t = threshold(density) / 2**32
    return np.array([t, 1 - 2 * t, t])


def goodness(observed, expected) -> float:
    """Tail probability of Pearson's statistic when every expected count is known beforehand."""
    observed, expected = np.ravel(observed), np.ravel(expected)
    assert expected.min() >= 5 and np.isclose(observed.sum(), expected.sum())
    return tail(((observed - expected) ** 2 / expected).sum(), len(observed) - 1)


def marginal(values, density: float) -> float:
    observed = np.bincount(np.ravel(values) + 1, minlength=3)
    return goodness(observed, probabilities(density) * values.size)


def joint(first, second, density: float) -> float:
    """Of the 3 x 3 table of two samples taken element by element; no element may occur twice."""
    pairs = 3 * (np.ravel(first) + 1) + np.ravel(second) + 1
    p = probabilities(density)
    return goodness(np.bincount(pairs, minlength=9), np.outer(p, p) * pairs.size)


def plausible(p: float) -> bool:
    return ALPHA < p < 1 - ALPHA


@pytest.mark.parametrize("role", [ROLE_A, ROLE_B], ids=["A", "B"])
@DENSITIES
def test_density_and_signs(density, role):
    assert plausible(marginal(sample(density, role), density))


@DENSITIES
def test_every_lane_has_the_density(density):
    # Each of the 64 columns of a group is its own (counter, word); a lane gone wrong shows here.
    values = sample(density)
    rows = [np.ravel(values[:, lane::64]) + 1 for lane in range(64)]
    observed = np.array([np.bincount(row, minlength=3) for row in rows])
    expected = np.tile(probabilities(density) * rows[0].size, (64, 1))
    # Each lane's total is fixed, which leaves two degrees of freedom a lane.
    assert plausible(tail(((observed - expected) ** 2 / expected).sum(), 2 * 64))


@pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
@DENSITIES
def test_support_of_a_row_or_column_is_binomial(density, axis):
    # The variance of the number of non-zeros; correlation anywhere within a line would change it.
    p = 2 * threshold(density) / 2**32
    counts = np.count_nonzero(sample(density), axis=axis)
    statistic = ((counts - SIDE * p) ** 2).sum() / (SIDE * p * (1 - p))
    assert plausible(tail(statistic, len(counts)))


@DENSITIES
def test_a_and_b_are_independent(density):
    assert plausible(joint(sample(density, ROLE_A), sample(density, ROLE_B), density))


@pytest.mark.parametrize("distance", [1, 16, 32, 64])
@DENSITIES
def test_neighbouring_columns_are_independent(density, distance):
    # Distance 16 and 32: the same counter, another output word. 64: the same word, another group.
    values = sample(density).reshape(SIDE, -1, 2, distance)
    assert plausible(joint(values[:, :, 0], values[:, :, 1], density))


@DENSITIES
def test_neighbouring_rows_are_independent(density):
    values = sample(density)
    assert plausible(joint(values[0::2], values[1::2], density))


@pytest.mark.parametrize("other", [SEED + 1, SEED + 2**32, SEED + 2**63], ids=hex)
@DENSITIES
def test_neighbouring_seeds_are_independent(density, other):
    assert plausible(joint(sample(density), sample(density, seed=other), density))


def test_wrong_density_is_detected():
    assert not plausible(marginal(sample(1 / 64), 1.05 / 64))
