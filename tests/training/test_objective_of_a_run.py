"""An objective names its paradigm and refuses settings that mean nothing."""

import pytest

from geopd.training.objective import Objective


def test_paradigm_and_need_of_a_teacher():
    assert [Objective(alpha).paradigm for alpha in (1.0, 1, 0.5, 0.0, 0)] == ["opd", "opd", "mix", "rlvr", "rlvr"]
    assert [Objective(alpha).needs_teacher for alpha in (1.0, 0.01, 0.0)] == [True, True, False]
    assert Objective(0.0, rollouts="teacher").needs_teacher


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"alpha": 1.5}, "alpha=1.5 is outside"),
        ({"alpha": float("nan")}, "alpha=nan is outside"),
        ({"alpha": 1.0, "token_selection": "bottom"}, "'bottom' is unknown: use one of all, top-gap, random"),
        ({"alpha": 1.0, "token_selection": "random", "rho": 0.0}, "rho=0.0 is outside"),
        ({"alpha": 1.0, "rho": 0.5}, "set top-gap or random"),
        ({"alpha": 0.0, "token_selection": "top-gap", "rho": 0.5}, "alpha=0 has none, use random"),
        ({"alpha": 1.0, "rollouts": "both"}, "'both' is unknown: use one of student, teacher"),
    ],
)
def test_settings_that_mean_nothing_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        Objective(**settings)
