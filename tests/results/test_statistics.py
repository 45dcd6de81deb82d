from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from geopd.results.statistics import t_interval, weighted_mean, wilson_interval


def test_t_interval_agrees_with_scipy() -> None:
    values = [0.3, 0.5, 0.1, 0.45]
    ours = t_interval(values)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert ours.estimate == pytest.approx(np.mean(values))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert ours.n == 4


def test_three_seeds_cover_about_the_stated_level() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(1.0, 0.4, size=(4000, 3))
    covered = [(i := t_interval(list(row))).low <= 1.0 <= i.high for row in draws]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_one_seed_makes_no_interval() -> None:
    with pytest.raises(ValueError, match="add seeds"):
        t_interval([0.4])


@pytest.mark.parametrize(("values", "sign"), [([1.0, 1.1], 1), ([-1.0, -1.1], -1), ([-1.0, 1.1], 0)])
def test_the_sign_of_an_interval_needs_zero_outside(values: list[float], sign: int) -> None:
    assert t_interval(values).sign == sign


def test_equivalence_needs_the_whole_interval_inside_the_margin() -> None:
    close = t_interval([0.01, 0.02, 0.015], level=0.9)
    assert close.within(0.1)
    assert not close.within(0.015)
    assert not t_interval([0.0, 0.4, -0.4], level=0.9).within(0.1)


@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0.5, 0.999))
def test_wilson_stays_a_proportion_and_contains_the_share(n: int, share: float, level: float) -> None:
    interval = wilson_interval(share, n, level)
    assert 0 <= interval.low <= share + 1e-12
    assert share - 1e-12 <= interval.high <= 1


def test_wilson_agrees_with_scipy() -> None:
    theirs = stats.binomtest(37, 120).proportion_ci(method="wilson")
    ours = wilson_interval(37 / 120, 120)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize(
    ("share", "n", "level", "said"),
    [(1.2, 10, 0.95, "proportion"), (0.5, 0, 0.95, "at least one trial"), (0.5, 10, 1.0, "between 0 and 1")],
)
def test_wilson_refuses_what_it_cannot_use(share: float, n: int, level: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        wilson_interval(share, n, level)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0.01, 1e3)), min_size=1, max_size=20))
def test_a_weighted_mean_lies_between_its_values(pairs: list[tuple[float, float]]) -> None:
    values, weights = zip(*pairs, strict=True)
    mean = weighted_mean(values, weights)
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) - slack <= mean <= max(values) + slack
    assert mean == pytest.approx(math.fsum(v * w for v, w in pairs) / math.fsum(weights), abs=slack)


@pytest.mark.parametrize(
    ("values", "weights", "said"),
    [
        ([1.0], [1.0, 2.0], "1 values but 2 weights"),
        ([1.0], [0.0], "positive sum"),
        ([1.0, 2.0], [1.0, -1.0], "weights"),
    ],
)
def test_a_weighted_mean_refuses_weights_that_mean_nothing(
    values: list[float], weights: list[float], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        weighted_mean(values, weights)
