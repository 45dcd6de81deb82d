"""Which coordinates two runs share and whether they move alike, against plain sets, planted overlaps and draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from brute_force import bf16_steps, changed, seen
from geopd.diagnostics import Comparison, OriginMatrix, Parameters, RunPair
from geopd.diagnostics.coordinates import (
    measure_jaccard,
    measure_signs,
    nulls_jaccard,
    nulls_signs,
    visible_signs,
)
from geopd.results import Status
from prescribed import PAIRS, normal

PARAMETERS = Parameters()


def runs_of(before: Tensor, one: Tensor, other: Tensor) -> RunPair:
    origin = OriginMatrix(before, PARAMETERS)
    return RunPair(origin, *(visible_signs(Comparison(origin, W)) for W in (one, other)))


def values(runs: RunPair) -> tuple[float | None, float | None]:
    (jaccard,), (signs,) = measure_jaccard(runs), measure_signs(runs)
    assert {jaccard.setting, signs.setting} == {"eta=0.001;view=bf16"}
    return jaccard.value, signs.value


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in ("zero update", "bf16 invisible", "tiny")])
def test_values_are_those_of_sets(name: str) -> None:
    before, one = PAIRS[name].before, PAIRS[name].after
    other = before.double() + 0.7 * (one.double() - before.double()) * normal(5, *before.shape).sign()
    other = other.to(one.dtype)
    ends = [seen(W, "bf16") for W in (before, one, other)]
    moved = [{i for i in np.ndindex(*before.shape) if changed(ends[0], end, 1e-3)[i]} for end in ends[1:]]
    both = moved[0] & moved[1]
    alike = [i for i in both if (ends[1][i] > ends[0][i]) == (ends[2][i] > ends[0][i])]
    jaccard, signs = values(runs_of(before, one, other))
    either = moved[0] | moved[1]
    assert jaccard == (pytest.approx(len(both) / len(either)) if either else None)
    assert signs == (pytest.approx(len(alike) / len(both)) if both else None)


def test_planted_overlap() -> None:
    before = torch.ones(2, 6).bfloat16()
    one, other = before.clone(), before.clone()
    one[0] += torch.tensor([1, 1, -1, -1, 1, 0]).bfloat16() / 4
    other[0] += torch.tensor([1, -1, -1, -1, 0, 1]).bfloat16() / 4
    assert values(runs_of(before, one, other)) == (4 / 6, 3 / 4)


def test_a_sign_change_has_the_direction_of_the_move() -> None:
    before = torch.tensor([[0.0, -0.0, 1e-3, -1e-3]]).bfloat16()
    after = torch.tensor([[1e-3, -1e-3, -1e-3, 1e-3]]).bfloat16()
    assert visible_signs(Comparison(OriginMatrix(before, PARAMETERS), after)).tolist() == [[1, -1, -1, 1]]
    assert bf16_steps(0.0, -0.0) == 0
    assert not visible_signs(Comparison(OriginMatrix(before, PARAMETERS), before * 1)).any()


def test_nothing_to_share() -> None:
    before = torch.ones(2, 3).bfloat16()
    one, other = before.clone(), before.clone()
    still = runs_of(before, one, other)
    assert measure_jaccard(still)[0].note == "no visible change in either run"
    assert nulls_jaccard(still) == nulls_signs(still) == []
    one[0, 0] = 2.0
    apart = runs_of(before, one, other)
    assert values(apart) == (0.0, None)
    assert measure_signs(apart)[0].status is Status.UNDEFINED
    assert measure_signs(apart)[0].note == "the runs share no visibly changed entry"
    assert nulls_signs(apart) == []
    assert nulls_jaccard(apart)[0].mean == 0.0


def test_the_null_of_shared_coordinates_by_hand() -> None:
    """Two magnitudes: densities (.5, .25) and (1, .25) among four entries each."""
    before = torch.tensor([[1.0, -1, 1, 1], [2, 2, -2, 2]]).bfloat16()
    one, other = before.clone(), before.clone()
    one[0, :2] *= 2
    other[0, 1] *= 2
    one[1] *= 2
    other[1, 0] *= 2
    (null,) = nulls_jaccard(runs_of(before, one, other))
    expected = 4 * 0.5 * 0.25 + 4 * 1 * 0.25
    assert null.mean == pytest.approx(expected / (2 + 1 + 4 + 1 - expected))
    assert null.null == "independent"


@pytest.mark.parametrize("size", [2e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("regime", ["on-grid", "off-grid"])
def test_independent_runs_score_their_null(regime: str, size: float) -> None:
    """Off the grid both runs cross the same thresholds: without the strata the null would be far below the draws."""
    before = (0.02 * normal(1, 400, 300)).to(torch.bfloat16 if regime == "on-grid" else torch.float32)
    excess: dict[str, list[float]] = {"jaccard": [], "signs": []}
    plain = []
    for seed in range(6):
        ends = [(before.double() + size * normal(2 * seed + i + 10, 400, 300)) for i in (0, 1)]
        runs = runs_of(before, *(W.to(before.dtype) for W in ends))
        for name, (item,), (null,) in (
            ("jaccard", measure_jaccard(runs), nulls_jaccard(runs)),
            ("signs", measure_signs(runs), nulls_signs(runs)),
        ):
            assert item.value is not None
            assert null.sd is not None
            excess[name].append((item.value - null.mean) / null.sd)
        plain.append(values(runs)[1] or 0.0)
    for name, z in excess.items():
        assert abs(np.mean(z)) < 4 / 6**0.5, (name, z)
        assert 0.3 < np.std(z, ddof=1) < 2.2, (name, z)
    if regime == "off-grid" and size < 1e-4:
        assert min(plain) > 0.6, "the side of the rounding cell decides many signs, whoever moves"


def test_runs_that_share_a_cause_exceed_their_null() -> None:
    before = (0.02 * normal(1, 200, 150)).bfloat16()
    common = normal(2, 200, 150)
    ends = [(before.double() + 5e-5 * (common + normal(s, 200, 150))).bfloat16() for s in (3, 4)]
    runs = runs_of(before, *ends)
    for (item,), (null,) in ((measure_jaccard(runs), nulls_jaccard(runs)), (measure_signs(runs), nulls_signs(runs))):
        assert item.value is not None
        assert null.sd is not None
        assert item.value > null.mean + 10 * null.sd
