"""A metric that has no value says so with its reason; it is never 0 or NaN instead."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from brute_force import DEFINED
from geopd.diagnostics import CATALOGUE, Comparison, OriginMatrix, Parameters, Rank, UpdateSubspace
from geopd.results import Measurement, Status
from geopd.spectral import decompose
from prescribed import PAIRS, normal, with_spectrum

PARAMETERS = Parameters(Rank("4"), Rank("3"), (0.5,), similarity_k=(2,), hill_k=(4,))
NOTHING = "no visible change: the overlap of nothing is undefined"
ZERO = "the update is exactly zero"


def measured(
    before: Tensor, after: Tensor, parameters: Parameters = PARAMETERS, final: Tensor | None = None
) -> dict[str, Measurement]:
    """The headline row of every metric."""
    end = None if final is None else UpdateSubspace(decompose(final.double() - before.double(), 2))
    comparison = Comparison(OriginMatrix(before, parameters), after, end)
    rows = [item for diagnostic in CATALOGUE for item in diagnostic.measure(comparison)]
    known = (DEFINED | {"subspace_similarity"}) - {"decay_coefficient"}
    return {item.metric: item for item in rows if item.is_default and item.metric in known}


def undefined(rows: dict[str, Measurement]) -> dict[str, str | None]:
    assert all((item.value is None) == (item.status is Status.UNDEFINED) for item in rows.values())
    return {item.metric: item.note for item in rows.values() if item.value is None}


def test_zero_update() -> None:
    W0 = normal(1, 24, 20).bfloat16()
    rows = measured(W0, W0.clone(), final=W0 + 0.1)
    assert undefined(rows) == {
        "low_magnitude_overlap": NOTHING,
        "principal_overlap": NOTHING,
        "stable_rank": ZERO,
        "hill_tail": ZERO,
        "principal_energy_left": ZERO,
        "principal_energy_right": ZERO,
        "subspace_similarity": "numerical rank of this update is 0 < K = 2",
    }
    assert rows["update_sparsity"].value == 1.0
    assert rows["rotation_left_max_deg"].value == 0.0
    assert rows["update_norm"].value == rows["update_operator_norm"].value == rows["spectral_shift"].value == 0.0


def test_zero_origin() -> None:
    rows = measured(torch.zeros(24, 20), normal(2, 24, 20).float())
    scale = "the origin is the zero matrix: no scale to compare with"
    rank = "numerical rank of the origin is 0 < k = 4"
    reasons = undefined(rows)
    assert reasons.pop("subspace_similarity")
    assert reasons.pop("relative_update_norm") == reasons.pop("spectral_shift") == scale
    assert all(note is not None and note.startswith(rank) for note in reasons.values())
    assert set(reasons) == {
        *(f"rotation_{side}_{summary}_deg" for side in ("left", "right") for summary in ("mean", "median", "max")),
        "principal_energy_left",
        "principal_energy_right",
    }
    # every entry is tied, so each counts for its share
    assert rows["low_magnitude_overlap"].value == pytest.approx(0.5)
    assert rows["principal_overlap"].value == pytest.approx(0.5)


def test_rank_deficient_origin_has_no_leading_subspace() -> None:
    before = with_spectrum([2.0, 1.0, 0.5], 24, 20)
    rows = measured(before, before + 1e-3 * normal(3, 24, 20))
    assert rows["rotation_left_mean_deg"].note == (
        "numerical rank of the origin is 3 < k = 4: no unique top-k subspace"
    )
    assert rows["principal_energy_right"].note == "numerical rank of the origin is 3 < k = 4"
    back = measured(before + 1e-3 * normal(3, 24, 20), before)
    assert back["rotation_left_mean_deg"].note == (
        "numerical rank of the checkpoint is 3 < k = 4: no unique top-k subspace"
    )
    assert back["spectral_shift"].status is Status.OK


def test_rank_deficient_update() -> None:
    before = with_spectrum([2.0, 1.0, 0.5, 0.25, 0.1], 24, 20)
    low = before + with_spectrum([0.1, 0.05, 0.01], 24, 20, seed=9)
    rows = measured(before, low)
    assert rows["hill_tail"].note == "numerical rank of the update is 3 < k = 4"
    assert rows["stable_rank"].value == pytest.approx((0.1**2 + 0.05**2 + 0.01**2) / 0.1**2, rel=1e-9)
    one = before + with_spectrum([0.1], 24, 20, seed=9)
    assert measured(before, one, final=low)["subspace_similarity"].note == "numerical rank of this update is 1 < K = 2"
    assert measured(before, low, final=one)["subspace_similarity"].note == (
        "numerical rank of the final update is 1 < K = 2"
    )


def test_equal_leading_singular_values_have_no_tail() -> None:
    before = torch.zeros(8, 8, dtype=torch.float64)
    rows = measured(before, torch.eye(8, dtype=torch.float64))
    assert rows["hill_tail"].note == "the 4 largest singular values are equal"
    assert rows["stable_rank"].value == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("shape", "left", "right"),
    [
        ((4, 30), "covers the whole left side of dimension 4", None),
        ((30, 4), None, "covers the whole right side of dimension 4"),
        ((3, 3), "covers the whole left side", "covers the whole right side"),
        ((1, 30), "covers the whole left side of dimension 1", None),
        ((30, 1), None, "covers the whole right side of dimension 1"),
        ((5, 5), None, None),
    ],
    ids=str,
)
def test_k_that_covers_a_side(shape: tuple[int, int], left: str | None, right: str | None) -> None:
    before = normal(5, *shape)
    rows = measured(before, before + 1e-2 * normal(6, *shape))
    for side, reason in (("left", left), ("right", right)):
        for metric in (f"rotation_{side}_max_deg", f"principal_energy_{side}"):
            item = rows[metric]
            if reason is None:
                assert item.value is not None
                assert item.value > 0
            else:
                assert item.status is Status.UNDEFINED
                assert item.note is not None
                assert reason in item.note


def test_k_cut_to_the_short_side_is_told() -> None:
    before = normal(5, 3, 30)
    rows = measured(before, before + 1e-2 * normal(6, 3, 30))
    assert rows["rotation_right_max_deg"].note == "k cut to min(m, n) = 3"
    assert rows["rotation_right_max_deg"].setting == "k=4;view=native", "the setting is what was asked"


def test_an_update_that_bf16_does_not_show() -> None:
    before = normal(7, 24, 20).bfloat16().float()
    rows = measured(before, before * (1 + 1e-6))
    assert rows["update_sparsity"].value == 1.0
    assert rows["low_magnitude_overlap"].note == rows["principal_overlap"].note == NOTHING
    assert rows["update_norm"].value is not None
    assert rows["update_norm"].value > 0
    assert rows["stable_rank"].status is Status.OK


def test_one_checkpoint_has_no_later_subspace() -> None:
    item = measured(normal(1, 24, 20), normal(2, 24, 20))["subspace_similarity"]
    assert item.status is Status.UNDEFINED
    assert item.note is not None
    assert "final subspace" in item.note


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in ("zero origin", "zero checkpoint")])
def test_perturbation_bounds_hold(name: str) -> None:
    """Mirsky and Weyl bound the spectrum's shift by the update, and Wedin the angles where there is a gap."""
    pair = PAIRS[name]
    comparison = Comparison(OriginMatrix(pair.before, PARAMETERS), pair.after)
    before, after = comparison.origin.decomposition, comparison.after
    slack = float((before.sigma_error + after.sigma_error).max())
    top = float(comparison.update_decomposition.sigma[0]) + float(comparison.update_decomposition.sigma_error[0])
    norm, error = comparison.update_norm
    assert float((after.sigma - before.sigma).abs().max()) <= top + slack
    shift = torch.linalg.vector_norm((after.sigma - before.sigma) / (norm or 1.0))
    assert float(shift) * norm <= norm + error + math.sqrt(before.sigma.numel()) * slack if norm else True
    k = comparison.origin.rotation_k
    following = float(after.sigma[k]) if k < after.sigma.numel() else 0.0
    gap = float(before.sigma[k - 1]) - following
    if gap > 0 and k < min(pair.before.shape):
        for side in ("left", "right"):
            sine = math.sin(math.radians(float(comparison.angles(side).max())))
            assert sine <= (top + slack) / gap * (1 + 1e-9)
