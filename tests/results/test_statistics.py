from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from geopd.results.statistics import explained_share, t_interval


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


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_level_outside_its_range_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        t_interval([0.1, 0.2], level)


@pytest.mark.parametrize(
    ("values", "nulls", "share"),
    [
        ((0.1, 0.4), (0.2, 0.8), 1.0),
        ((0.1, 0.4), (0.3, 0.3), 0.0),
        ((0.1, 0.4), (0.2, 0.4), 0.5),
        ((0.1, 0.1), (1, 2), None),
    ],
    ids=["nulls differ as much", "nulls do not differ", "half", "no contrast"],
)
def test_the_explained_share_is_what_effect_sizes_lose_of_the_contrast(
    values: tuple[float, float], nulls: tuple[float, float], share: float | None
) -> None:
    contrast, null_contrast = (math.log(high / low) for low, high in (values, nulls))
    found = explained_share(contrast, null_contrast)
    assert found == (None if share is None else pytest.approx(share))
    if found is not None:
        effects = [math.log(value / null) for value, null in zip(values, nulls, strict=True)]
        assert found == pytest.approx(1 - (effects[1] - effects[0]) / contrast)
