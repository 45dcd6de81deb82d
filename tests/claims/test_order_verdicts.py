"""What the seeds decide about an order, with the truth planted in the per-seed numbers and their nulls."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np
import pytest
from scipy import stats

from geopd.results import Results
from judged_claims import judged
from planted_results import Planted, results_of

STEADY = (0.0, 0.05, -0.05)


def trio(
    ends: dict[str, float],
    nulls: dict[str, float] | None = None,
    *,
    metric: str = "update_sparsity",
    noise: dict[str, Sequence[float]] | None = None,
    seeds: int = 3,
) -> Results:
    """SFT from the base, OPD and RLVR in each seed: the ends times ``exp(noise[seed])``, at the last of two steps."""
    runs = []
    for seed in range(seeds):
        for paradigm, end in ends.items():
            value = end * np.exp((noise or {}).get(paradigm, STEADY)[seed])
            null = {} if nulls is None else {metric: (0.1, nulls[paradigm] * np.exp(STEADY[seed]))}
            runs.append(
                Planted(
                    f"{paradigm}-s{seed}",
                    paradigm,
                    {metric: (0.1, value)},
                    seed,
                    "base" if paradigm == "sft" else "anchor",
                    (10, 20),
                    null,
                )
            )
    return results_of(*runs)


APART = {"sft": 0.1, "opd": 0.3, "rlvr": 0.6}
FLAT = {"sft": 0.3, "opd": 0.3, "rlvr": 0.3}


def test_an_order_in_every_seed_is_held_and_beyond_a_null_without_it() -> None:
    found = judged(trio(APART, FLAT), "sparsity_order")["paper"]
    assert (found["verdict"], found["beyond_null"], found["explained"]) == ("held", "yes", "no")
    assert found["sentence"].endswith("Over seeds: held, and beyond its null.")
    assert found["reason"] is None
    assert [s["estimate"] for s in found["statements"]] == pytest.approx([log(3), log(2)])


def test_an_order_that_the_null_has_whole_is_held_explained_by_update_size() -> None:
    found = judged(trio(APART, APART), "sparsity_order")["paper"]
    assert (found["verdict"], found["explained"]) == ("held", "yes")
    assert found["sentence"].endswith("Over seeds: held, explained by update size.")
    assert all(s["explained_share"] == pytest.approx(1) for s in found["statements"])


def test_a_small_rest_beyond_the_null_does_not_undo_the_explanation() -> None:
    most = {"sft": 0.1, "opd": 0.1 * 3**0.95, "rlvr": 0.1 * 6**0.95}
    found = judged(trio(APART, most), "sparsity_order")["paper"]
    assert (found["beyond_null"], found["explained"]) == ("yes", "yes")
    assert found["sentence"].endswith("Over seeds: held, explained by update size, all but under 20% of it.")


def test_half_a_contrast_in_the_null_explains_nothing_away() -> None:
    half = {"sft": 0.1, "opd": 0.1 * 3**0.5, "rlvr": 0.1 * 6**0.5}
    found = judged(trio(APART, half), "sparsity_order")["paper"]
    assert (found["beyond_null"], found["explained"]) == ("yes", "no")
    assert [s["explained_share"] for s in found["statements"]] == pytest.approx([0.5, 0.5])


def test_not_beyond_the_null_is_not_yet_explained_by_it() -> None:
    loose = {"sft": (0.4, -0.5, 0.1), "opd": (-0.4, 0.5, 0.1), "rlvr": (0.0, 0.3, -0.1)}
    wide = {"sft": 0.01, "opd": 0.3, "rlvr": 9.0}
    found = judged(trio(wide, wide, noise=loose), "sparsity_order")["paper"]
    assert (found["verdict"], found["beyond_null"], found["explained"]) == ("held", "unresolved", "no")
    assert found["sentence"].endswith("Over seeds: held; whether beyond its null is unresolved.")


def test_a_null_that_shows_more_of_it_is_said_to() -> None:
    more = {"sft": 0.01, "opd": 0.3, "rlvr": 9.0}
    found = judged(trio(APART, more), "sparsity_order")["paper"]
    assert found["beyond_null"] == "no"
    assert found["sentence"].endswith("Over seeds: held, but its null shows even more of it.")
    half = judged(trio(APART, more | {"sft": 0.3}), "sparsity_order")["paper"]
    assert half["sentence"].endswith("Over seeds: held, but its null shows even more of this: OPD < RLVR.")


def test_one_pair_the_wrong_way_round_in_every_seed_did_not_hold() -> None:
    found = judged(trio({"sft": 0.1, "opd": 0.6, "rlvr": 0.3}), "sparsity_order")["paper"]
    assert [s["verdict"] for s in found["statements"]] == ["held", "did not hold"]
    assert found["verdict"] == "did not hold"
    assert found["deciding"] == "OPD < RLVR"
    assert found["reason"] == "the interval over seeds excludes this: OPD < RLVR"
    assert found["sentence"].endswith("Over seeds: did not hold.")


def test_a_spread_across_the_line_is_unresolved_and_says_how_many_seeds_would_do() -> None:
    spread = {"opd": (0.0, 0.0, 0.0), "rlvr": (0.2, -0.3, 0.1)}
    found = judged(trio({"sft": 0.01, "opd": 0.3, "rlvr": 0.45}, noise=spread), "sparsity_order")["paper"]
    assert [s["verdict"] for s in found["statements"]] == ["held", "unresolved"]
    assert found["verdict"] == "unresolved"
    assert found["deciding"] == "OPD < RLVR"
    assert found["reason"] == "the interval over seeds does not settle it"
    mean, sd = log(1.5), np.std(spread["rlvr"], ddof=1)
    fewest = next(n for n in range(2, 100) if stats.t.ppf(0.975, n - 1) * sd / n**0.5 < mean)
    assert found["seeds_needed"] == fewest == found["statements"][1]["seeds_needed"]
    assert f"{fewest} seeds would settle it" in found["sentence"]
    low, high = found["interval"]
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, mean, sd / 3**0.5))


def test_one_seed_is_described_and_not_judged() -> None:
    found = judged(trio(APART, APART, seeds=1), "sparsity_order")["paper"]
    assert (found["shows_here"], found["verdict"], found["beyond_null"]) == ("yes", "unresolved", "unresolved")
    assert (found["interval"], found["seeds"], found["seeds_needed"]) == (None, 1, None)
    assert found["reason"].startswith("one seed")


def test_numbers_of_both_signs_compare_by_difference_like_their_nulls() -> None:
    found = judged(trio(APART, {"sft": -0.2, "opd": 0.0, "rlvr": 0.3}), "sparsity_order")["paper"]["statements"][0]
    assert found["estimate"] == pytest.approx(0.2 * np.mean(np.exp(STEADY)))
    assert found["null_estimate"] == pytest.approx(0.2 * np.mean(np.exp(STEADY)))


@pytest.mark.parametrize(
    ("id_", "metric", "ends", "text"),
    [
        ("principal_order", "principal_overlap", (0.29, 0.2, 0.1), "OPD < 0.3, the overlap of a random mask"),
        ("low_magnitude_order", "low_magnitude_overlap", (0.31, 0.5, 0.7), "OPD > 0.3, the overlap of a random mask"),
    ],
)
def test_an_overlap_is_held_against_chance(id_: str, metric: str, ends: tuple[float, float, float], text: str) -> None:
    sft, opd, rlvr = ends
    found = judged(trio({"sft": sft, "opd": opd, "rlvr": rlvr}, metric=metric), id_)["paper"]
    assert found["statements"][-1]["text"] == text
    assert found["verdict"] == "held"
    # the same order on the other side of chance
    factor = 2.0 if opd < 0.3 else 0.5
    moved = {"sft": sft * factor, "opd": opd * factor, "rlvr": rlvr * factor}
    found = judged(trio(moved, metric=metric), id_)["paper"]
    assert [s["verdict"] for s in found["statements"]] == ["held", "held", "did not hold"]
