"""Predicted against realised visible changes: planted masks, Gaussian updates, and where prediction is circular."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geopd.diagnostics import Comparison, OriginMatrix, Parameters
from geopd.diagnostics.visible_mask import METRICS, measure, nulls
from geopd.results import Status
from prescribed import normal


def compare(before: Tensor, after: Tensor, eta: float = 1e-3) -> Comparison:
    return Comparison(OriginMatrix(before, Parameters(eta=eta)), after)


def values(comparison: Comparison) -> list[float | None]:
    """Jaccard, precision, recall."""
    rows = measure(comparison)
    assert [row.metric for row in rows] == list(METRICS)
    assert {row.setting for row in rows} == {f"eta={comparison.parameters.eta};view=bf16"}
    assert {null.metric for null in nulls(comparison)} <= {row.metric for row in rows if row.value is not None}
    return [row.value for row in rows]


def test_planted_changes() -> None:
    """At 1.5 a step is 2^-7. Entries that start inside their rounding cell cross its edge sooner or later than half."""
    up, quarter = 2.0**-8, 2.0**-9
    before = torch.tensor([[1.5, 1.5, 1.5, 1.5 + 1.5 * quarter, 1.5 - 1.5 * quarter, 1.5]])
    moved = torch.tensor([[1.1 * up, -1.1 * up, 0.9 * up, quarter, 1.1 * up, 0.0]])
    # foreseen: 0, 1, 4; realised: 0, 1, 3
    assert values(compare(before, before + moved)) == [2 / 4, 2 / 3, 2 / 3]


def test_a_step_towards_zero_at_a_power_of_two_is_seen_and_not_foreseen() -> None:
    before = torch.tensor([[1.0, 1.0]])
    inwards = torch.tensor([[-0.4 * 2.0**-7, 0.6 * 2.0**-7]])
    assert values(compare(before, before + inwards)) == [1 / 2, 1.0, 1 / 2]


def test_an_origin_in_bf16_leaves_only_powers_of_two_to_chance() -> None:
    before = (0.02 * normal(1, 300, 200)).bfloat16()
    jaccard, precision, recall = values(compare(before, before.float() + 6e-5 * normal(2, 300, 200).float()))
    assert jaccard is not None
    assert recall is not None
    assert precision == 1.0
    assert jaccard == recall
    assert 0.99 < recall < 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [2e-6, 6e-5, 1e-3])
def test_the_null_is_what_gaussian_updates_score(scale: float, dtype: torch.dtype) -> None:
    before = (0.02 * normal(1, 400, 300)).to(dtype)
    comparison = compare(before, before.float() + scale * normal(2, 400, 300).float())
    expected = {null.metric: null.mean for null in nulls(comparison)}
    assert set(expected) == set(METRICS)
    for metric, value in zip(METRICS, values(comparison), strict=True):
        assert value == pytest.approx(expected[metric], abs=0.01 if scale > 1e-5 else 0.04)


def test_more_than_one_block_of_rows() -> None:
    before = (0.02 * normal(1, 700, 1000)).float()
    after = before + 6e-5 * normal(2, 700, 1000).float()
    step = torch.exp2(torch.floor(torch.log2(before.bfloat16().double().abs())) - 7)
    foreseen = (after.double() - before.double()).abs() >= step / 2
    seen = before.bfloat16() != after.bfloat16()
    both = float((foreseen & seen).sum())
    expected = [both / float(mask.sum()) for mask in (foreseen | seen, foreseen, seen)]
    assert values(compare(before, after)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (torch.full((2, 2), 1.25).bfloat16(), "the checkpoint is stored as bfloat16"),
        (torch.full((2, 2), 1.25).half(), "the checkpoint is stored as float16"),
        (torch.full((2, 2), 1.25), "the checkpoint holds bf16 numbers only"),
        (torch.full((2, 2), 1.0), "the update is exactly zero"),
    ],
)
def test_what_masters_alone_can_tell_is_undefined_without_them(after: Tensor, reason: str) -> None:
    comparison = compare(torch.ones(2, 2), after)
    assert values(comparison) == [None] * 3
    assert nulls(comparison) == []
    for row in measure(comparison):
        assert row.status is Status.UNDEFINED
        assert row.note is not None
        assert row.note.startswith(reason)


def test_each_ratio_needs_entries_of_its_own() -> None:
    before = torch.tensor([[1.5, 1.5 + 1.5 * 2.0**-9]])
    none = compare(before, before + 1e-6)
    seen_only = compare(before, before + torch.tensor([[0.0, 2.0**-9]]))
    inside = torch.tensor([[1.5, 1.5 - 1.5 * 2.0**-9]])
    foreseen_only = compare(inside, inside + torch.tensor([[0.0, 1.1 * 2.0**-8]]))
    assert values(none) == [None, None, None]
    assert values(seen_only) == [0.0, None, 0.0]
    assert values(foreseen_only) == [0.0, 0.0, None]
    assert [row.note for row in measure(none)] == [
        "no entry moved by half a bf16 step and none changed visibly",
        "no entry moved by half a bf16 step",
        "no entry changed visibly",
    ]


def test_there_is_no_null_where_the_threshold_and_not_the_grid_decides() -> None:
    before = (0.02 * normal(1, 40, 30)).float()
    comparison = compare(before, before + 1e-3 * normal(2, 40, 30).float(), eta=0.01)
    assert None not in values(comparison)
    assert nulls(comparison) == []
