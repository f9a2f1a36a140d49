"""Balanced bases look random: supports and signs, by the chi-square tests of version 1's file."""

import math
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from balanced_reference import ROLE_A, ROLE_B, lines
from test_basis_statistics import goodness, plausible, tail

SEED, LINES, R, Q, N = 2025, 3000, 17, 4, 9  # 16 degrees of freedom: `tail` wants an even number


@cache
def sample(role: int = ROLE_B, seed: int = SEED):
    """(lines, r, n): by group."""
    values = lines(seed, role, 0, LINES, R, Q, N).reshape(LINES, N, R).transpose(0, 2, 1)
    values.setflags(write=False)
    return values


def chosen(role: int = ROLE_B, seed: int = SEED):
    """(lines, r): whether a group is in a line's support."""
    return (sample(role, seed) != 0).any(axis=2)


def counts_fit(inside) -> float:
    """Of how often each group is chosen: q of r without replacement has covariance
    p (1 - p) r / (r - 1) (I - 1 / r), so Pearson's statistic is divided by 1 - p on its r - 1."""
    p = Q / R
    observed = inside.sum(axis=0)
    pearson = ((observed - LINES * p) ** 2 / (LINES * p)).sum()
    return tail(pearson * (R - 1) / (R * (1 - p)), R - 1)


@pytest.mark.parametrize("role", [ROLE_A, ROLE_B], ids=["A", "B"])
def test_every_line_has_q_groups_entirely(role):
    values = sample(role)
    assert (chosen(role).sum(axis=1) == Q).all()
    assert ((values != 0) == chosen(role)[:, :, None]).all()


@pytest.mark.parametrize("role", [ROLE_A, ROLE_B], ids=["A", "B"])
def test_every_group_is_equally_likely(role):
    assert plausible(counts_fit(chosen(role)))


def test_every_pair_of_groups_is_equally_likely():
    inside = chosen().astype(int)
    together = np.array([(inside[:, a] * inside[:, b]).sum() for a, b in combinations(range(R), 2)])
    p = Q * (Q - 1) / (R * (R - 1))
    # Standard deviation of a pair's count; the largest of 136 stays below 4.5 of them.
    deviation = np.abs(together - LINES * p) / math.sqrt(LINES * p * (1 - p))
    assert 1.5 < deviation.max() < 4.5


@pytest.mark.parametrize("role", [ROLE_A, ROLE_B], ids=["A", "B"])
def test_signs_are_balanced_for_every_element(role):
    values = sample(role)
    plus, minus = (values == 1).sum(axis=(0, 1)), (values == -1).sum(axis=(0, 1))
    half = LINES * Q / 2
    # One degree of freedom for each of the n elements; the last is left out to make them even.
    assert plausible(tail((((plus - minus)[:-1] / 2) ** 2 / (half / 2)).sum(), N - 1))


def deviation(first, second) -> float:
    """Of the number of equal signs from one half, in standard deviations."""
    return abs((first == second).sum() - first.size / 2) / math.sqrt(first.size / 4)


def signs_where_both(first, second):
    both = (first != 0) & (second != 0)
    return first[both], second[both]


def test_neighbouring_elements_lines_and_groups_are_independent():
    values = sample()
    for first, second in (
        (values[:, :, :-1:2], values[:, :, 1::2]),
        (values[0::2], values[1::2]),
        (values[:, :-1:2], values[:, 1::2]),
    ):
        assert deviation(*signs_where_both(first, second)) < 4


@pytest.mark.parametrize(
    "other", [(ROLE_A, SEED), (ROLE_B, SEED + 1), (ROLE_B, SEED + 2**32)], ids=["A", "low", "high"]
)
def test_matrices_and_seeds_are_independent(other):
    mine, its = sample(), sample(*other)
    assert deviation(*signs_where_both(mine, its)) < 4
    # Common groups of two lines are hypergeometric.
    common = (chosen() & chosen(*other)).sum(axis=1)
    ways = [math.comb(Q, k) * math.comb(R - Q, Q - k) / math.comb(R, Q) for k in range(Q + 1)]
    ways = np.array([*ways[:2], sum(ways[2:])])  # cells of 5 or more expected
    observed = np.bincount(np.minimum(common, 2), minlength=3)
    assert plausible(goodness(observed, ways * LINES))


def test_a_preferred_group_is_detected():
    inside = chosen().copy()
    moved = np.flatnonzero(inside[:, 3] & ~inside[:, 8])[::6]
    inside[moved, 3], inside[moved, 8] = False, True
    assert not plausible(counts_fit(inside))


def test_dependent_signs_are_detected():
    first, second = signs_where_both(sample(), sample(ROLE_A))
    second = second.copy()
    second[::20] = first[::20]
    assert deviation(first, second) > 4
