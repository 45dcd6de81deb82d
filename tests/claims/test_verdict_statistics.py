"""Intervals, equivalence, what a null explains and how many seeds would do, each against another way to compute it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from geopd.results.statistics import (
    MOST_REPLICATES,
    first_crossing,
    isotonic,
    replicates_needed,
    t_interval_of,
    within_share,
)


def brute_force_seeds(values: list[float], margin: float | None) -> int | None:
    """Plays the test through for ever more seeds of the observed mean and spread, with scipy's quantiles."""
    mean, sd = np.mean(values), np.std(values, ddof=1)
    for n in range(2, MOST_REPLICATES + 1):
        half = stats.t.ppf(0.975 if margin is None else 0.95, n - 1) * sd / n**0.5
        low, high = mean - half, mean + half
        inside, outside = (low > 0, high < 0)
        if margin is not None:
            inside, outside = (-margin < low and high < margin), (low > margin or high < -margin)
        if inside or outside:
            return n
    return None


@pytest.mark.parametrize("margin", [None, 0.14])
def test_the_seeds_needed_are_the_fewest_that_a_search_finds(margin: float | None) -> None:
    rng = np.random.default_rng(3)
    found = []
    for _ in range(60):
        values = list(rng.normal(0.05, 0.1, size=int(rng.integers(2, 6))))
        found.append(replicates_needed(values, margin=margin))
        assert found[-1] == brute_force_seeds(values, margin)
    assert None in found
    assert len(set(found)) > 5


@pytest.mark.parametrize(
    ("values", "margin"),
    [([0.3], None), ([], 0.14), ([0.1, -0.1, 1e-6], None), ([1e-6, -1e-6, 3e-9], None)],
)
def test_no_number_of_seeds_is_named_where_more_would_not_help(values: list[float], margin: float | None) -> None:
    assert replicates_needed(values, margin=margin) is None


def test_one_value_and_a_spread_known_from_elsewhere_name_the_seeds_that_such_values_would_need() -> None:
    same = [0.5 + 0.2 * d for d in (-1.0, 1.0, 0.0)]  # mean .5, standard deviation .2
    assert replicates_needed([0.5], margin=0.14, spread=0.2) == replicates_needed(same, margin=0.14)
    assert replicates_needed([-0.5], spread=0.2) == replicates_needed(same)


def test_a_contrast_is_explained_if_both_one_sided_tests_reject() -> None:
    rng = np.random.default_rng(5)
    answers = []
    for _ in range(80):
        contrast = rng.normal(1.0, 0.1, size=3) * rng.choice([-1, 1])
        left = rng.normal(0.0, 0.06, size=3)
        sign = np.sign(contrast.mean())
        upper = stats.ttest_1samp(left - 0.2 * sign * contrast, 0, alternative="less").pvalue
        lower = stats.ttest_1samp(left + 0.2 * sign * contrast, 0, alternative="greater").pvalue
        answers.append(within_share(list(left), list(contrast), 0.2))
        assert answers[-1] == (max(upper, lower) < 0.05)
    assert {True, False} == set(answers)


def test_what_a_null_leaves_needs_a_contrast_for_every_seed() -> None:
    with pytest.raises(ValueError, match="2 differences beside 3 contrasts"):
        within_share([0.1, 0.2], [1.0, 1.0, 1.0], 0.2)


def test_one_value_with_a_known_spread_has_the_quantiles_of_its_degrees_of_freedom() -> None:
    interval = t_interval_of(0.3, 0.1, 2, 0.9)
    assert (interval.low, interval.high) == pytest.approx(stats.t.interval(0.9, 2, 0.3, 0.1))
    with pytest.raises(ValueError, match="0 degrees of freedom"):
        t_interval_of(0.3, 0.1, 0)


def brute_force_isotonic(values: list[float], weights: list[float]) -> list[float]:
    """The best of all ways to cut the sequence into blocks whose means do not fall."""
    n, best, found = len(values), np.inf, values
    for cuts in itertools.product([False, True], repeat=n - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
        blocks = [(a, b, np.average(values[a:b], weights=weights[a:b])) for a, b in itertools.pairwise(edges)]
        if any(x[2] > y[2] for x, y in itertools.pairwise(blocks)):
            continue
        fit = [mean for a, b, mean in blocks for _ in range(b - a)]
        loss = sum(w * (v - f) ** 2 for v, f, w in zip(values, fit, weights, strict=True))
        if loss < best - 1e-12:
            best, found = loss, fit
    return found


def test_the_isotonic_fit_is_the_best_of_all_blockings() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        n = int(rng.integers(1, 8))
        values, weights = list(rng.normal(size=n)), list(rng.integers(1, 5, size=n).astype(float))
        assert isotonic(values, weights) == pytest.approx(brute_force_isotonic(values, weights))


def test_an_isotonic_fit_needs_weights_above_zero() -> None:
    with pytest.raises(ValueError, match="a weight above zero"):
        isotonic([0.1, 0.2], [1, 0])


@pytest.mark.parametrize(
    ("y", "level", "x"),
    [
        ([0.1, 0.3, 0.5], 0.3, 20.0),
        ([0.1, 0.3, 0.5], 0.4, 25.0),
        ([0.1, 0.5, 0.2, 0.5], 0.3, 15.0),
        ([0.1, 0.3, 0.5], 0.6, None),
        ([0.4, 0.5, 0.6], 0.3, None),
        ([0.4, 0.5, 0.6], 0.4, None),
        ([], 0.4, None),
    ],
    ids=["at a point", "between", "the first of three", "never", "before the start", "at the start", "nothing"],
)
def test_a_level_is_crossed_once_and_from_below(y: list[float], level: float, x: float | None) -> None:
    assert first_crossing([10 * (i + 1) for i in range(len(y))], y, level) == (x if x is None else pytest.approx(x))
