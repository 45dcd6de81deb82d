"""Nulls by drawing: they agree with the closed forms, keep what they say they keep, and depend on the seed alone."""

from __future__ import annotations

import pytest
import torch
from planted_updates import weights

from geopd.diagnostics import CATALOGUE, Comparison, OriginMatrix, Parameters, Rank, drawn_nulls, select
from geopd.diagnostics.drawn import _permuted
from prescribed import normal

PARAMETERS = Parameters(rotation_k=Rank("16"), principal_rank=Rank("8"))


def structured(dtype: torch.dtype = torch.bfloat16) -> Comparison:
    """Changes that lie on few rows: what no null has."""
    W0 = weights("plain", 200, 120).to(dtype)
    update = 2e-4 * normal(3, 200, 120)
    update[50:] /= 10
    return Comparison(OriginMatrix(W0, PARAMETERS), (W0.double() + update).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_drawn_gaussians_agree_with_the_closed_forms(dtype: torch.dtype) -> None:
    comparison = structured(dtype)
    asked = [d for d in CATALOGUE if set(d.metrics) & {"update_sparsity", "stable_rank", "principal_energy_left"}]
    drawn = {
        (n.metric, n.setting): n
        for n in drawn_nulls(comparison, [d.measure for d in asked], 6, 1)
        if n.null == "gaussian"
    }
    closed = [n for d in asked for n in d.nulls(comparison) if n.null == "gaussian"]
    assert closed
    for null in closed:
        other = drawn[null.metric, null.setting]
        assert other.draws == 6
        assert other.sd is not None
        assert other.mean == pytest.approx(null.mean, rel=0.06, abs=0.004)


def test_the_stored_energy_is_what_is_matched() -> None:
    comparison = structured()
    (norm,) = select(["update_norm"])
    drawn = {n.null: n for n in drawn_nulls(comparison, [norm.measure], 4, 1)}
    assert drawn["gaussian"].mean == pytest.approx(comparison.update_norm[0], rel=0.03)
    assert drawn["permuted"].mean == pytest.approx(comparison.update_norm[0], rel=1e-12)


def test_permuting_keeps_density_energy_and_low_overlap_and_breaks_the_rest() -> None:
    comparison = structured()
    origin = comparison.origin
    permuted = Comparison(origin, _permuted(comparison, torch.Generator().manual_seed(1)))
    assert (permuted.changed_counts("bf16") == comparison.changed_counts("bf16")).all()
    assert permuted.update_norm[0] == pytest.approx(comparison.update_norm[0], rel=1e-12)
    rows = comparison.changed("bf16").double().mean(dim=1)
    shuffled = permuted.changed("bf16").double().mean(dim=1)
    assert rows[:50].mean() > 2 * rows[50:].mean(), "planted"
    assert shuffled[:50].mean() == pytest.approx(float(shuffled[50:].mean()), rel=0.1)


def test_draws_depend_on_the_seed_alone() -> None:
    (rank,) = select(["stable_rank"])

    def means(seed: int) -> list[float]:
        return [null.mean for null in drawn_nulls(structured(), [rank.measure], 2, seed)]

    assert means(5) == means(5)
    assert means(5) != means(6)


def test_one_draw_has_no_spread_and_none_draws_nothing() -> None:
    (rank,) = select(["stable_rank"])
    assert {null.sd for null in drawn_nulls(structured(), [rank.measure], 1, 0)} == {None}
    assert drawn_nulls(structured(), [rank.measure], 0, 0) == []
    W0 = weights("plain", 20, 10)
    assert drawn_nulls(Comparison(OriginMatrix(W0, PARAMETERS), W0), [rank.measure], 2, 0) == []
