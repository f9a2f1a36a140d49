"""The generated matrices look random: density, signs, and independence, by chi-square tests.

Seeds are fixed. The probability of a statistic at least as large must lie in (ALPHA, 1 - ALPHA):
neither too irregular nor too regular. Probabilities come from the integer threshold, none is
estimated, so a table of k cells has k - 1 degrees of freedom.
"""

import functools

import numpy as np
import pytest
from basis_reference import ROLE_A, ROLE_B, ROLE_COL, ROLE_ROW, ROLE_S, threshold
from basis_vectors import from_planes
from scipy.stats import chi2, chisquare

from randlora_ext.basis.ternary import generate_planes

ALPHA = 1e-4
SEED = 2025
SIDE = 1024  # about a million elements a sample


def sample(density: float, role: int = ROLE_B, seed: int = SEED):
    return from_planes(generate_planes(seed, role, 0, SIDE, 0, SIDE, density).numpy(), SIDE)


def probabilities(density: float):
    """Of -1, 0 and +1."""
    t = threshold(density) / 2**32
    return np.array([t, 1 - 2 * t, t])


def independent(density: float, *samples) -> bool:
    """By the table of the values that samples have element by element."""
    cells = sum(3**at * (np.ravel(values) + 1) for at, values in enumerate(samples))
    expected = functools.reduce(np.outer, [probabilities(density)] * len(samples)).ravel()
    observed = np.bincount(cells, minlength=expected.size)
    return ALPHA < chisquare(observed, expected * cells.size).pvalue < 1 - ALPHA


@pytest.mark.parametrize("density", [1 / 3, 0.07, 1 / 64], ids=["1/3", "0.07", "1/64"])
def test_elements_are_independent_draws(density):
    values = sample(density)
    assert independent(density, values) and independent(density, sample(density, ROLE_A))
    assert not independent(1.05 * density, values)
    # Each of the 64 columns of a group is its own (counter, word); a lane gone wrong shows here.
    lanes = (values.reshape(-1, 64).T + 1)[:, :, None] == np.arange(3)
    expected = np.tile(probabilities(density) * lanes.shape[1], (64, 1))
    p = chisquare(lanes.sum(1), expected, axis=None, ddof=63).pvalue  # each lane's total is fixed
    assert ALPHA < p < 1 - ALPHA
    # The variance of the number of non-zeros; correlation anywhere within a line would change it.
    share = 2 * threshold(density) / 2**32
    for axis in (0, 1):
        counts = np.count_nonzero(values, axis=axis)
        statistic = ((counts - SIDE * share) ** 2).sum() / (SIDE * share * (1 - share))
        assert ALPHA < chi2.sf(statistic, SIDE) < 1 - ALPHA
    for role in (ROLE_A, ROLE_S, ROLE_ROW, ROLE_COL):
        assert independent(density, values, sample(density, role)), role
    assert independent(density, values[0::2], values[1::2])
    # Distance 16 and 32: the same counter, another output word. 64: the same word, another group.
    for distance in (1, 16, 32, 64):
        pairs = values.reshape(SIDE, -1, 2, distance)
        assert independent(density, pairs[:, :, 0], pairs[:, :, 1]), distance
    for seed in (SEED + 1, SEED + 2**32, SEED + 2**63):
        assert independent(density, values, sample(density, seed=seed)), seed
