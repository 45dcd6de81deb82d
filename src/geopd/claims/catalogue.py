"""The claims, numbered and by research question, and how they are decided for a results folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geopd.claims.alignment import early_alignment
from geopd.claims.comparisons import Comparison, described
from geopd.claims.controls import mixture, teacher_rollouts, token_selection
from geopd.claims.endpoints import MEAN_ROTATION, MIDDLE_LAYER_ROTATION, VISIBLE_DENSITY, mean_of
from geopd.claims.orders import norm_at_stable_rank, ordering, overlap
from geopd.claims.projection import projection
from geopd.claims.trajectories import hill_trend, stable_rank_path
from geopd.claims.variants import stable_over_variants
from geopd.claims.verdicts import NOT_MEASURED
from geopd.results import Results, read_results, write_json
from geopd.results.reference import FROM_FIGURES, PAPER, PAPER_MODEL, REFERENCE

QUESTIONS = {
    "RQ1": "Where does OPD lie in parameter space, between SFT and RLVR?",
    "RQ2": "What path do OPD's updates take?",
    "RQ3": "What controls that path?",
}
_UNMATCHED_NORM = ("paper", "same_origin", "same_origin@steps", "same_origin@accuracy")
_SPEAKS = (
    "shows_here",
    "null_shows",
    "verdict",
    "beyond_null",
    "explained",
    "estimate",
    "interval",
    "seeds",
    "seeds_needed",
    "reason",
    "sentence",
)
"""Fields that an entry takes from the comparison that speaks for the claim."""


@dataclass(frozen=True)
class Claim:
    """What the paper says, the line of its reference numbers, and the function that looks at it.

    ``first_speaks``: the first comparison speaks for the claim even where it could not be decided and others could;
    otherwise the first with the most roles does.
    """

    number: str
    question: str
    id: str
    title: str
    statement: str
    reference: str
    compare: Callable[[Results], list[Comparison]]
    first_speaks: bool = False


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "C1",
        "RQ1",
        "sparsity_order",
        "bf16 sparsity",
        "OPD leaves more weights visibly unchanged than SFT, RLVR more than OPD.",
        "update_sparsity",
        ordering(mean_of("update_sparsity"), "sft", "opd", "rlvr"),
    ),
    Claim(
        "C1b",
        "RQ1",
        "density_order",
        "visible update density",
        "Per matrix, SFT visibly changes most weights, then OPD, then RLVR.",
        "visible_density",
        ordering(VISIBLE_DENSITY, "rlvr", "opd", "sft"),
    ),
    Claim(
        "C2",
        "RQ1",
        "rotation_order",
        "rotation of a representative layer",
        "SFT turns the middle layer's leading singular subspaces most, then OPD, then RLVR (mean over it).",
        "rotation",
        ordering(MIDDLE_LAYER_ROTATION, "rlvr", "opd", "sft"),
    ),
    Claim(
        "C2b",
        "RQ1",
        "mean_rotation_order",
        "rotation over all layers",
        "SFT turns the leading singular subspaces most, then OPD, then RLVR (mean over all matrices).",
        "rotation",
        ordering(MEAN_ROTATION, "rlvr", "opd", "sft"),
    ),
    Claim(
        "C3",
        "RQ1",
        "spectral_shift_order",
        "normalised spectral shift",
        "SFT moves the singular values most, then OPD, then RLVR (only the order is looked at).",
        "spectral_shift",
        ordering(mean_of("spectral_shift"), "rlvr", "opd", "sft"),
    ),
    Claim(
        "C4",
        "RQ1",
        "principal_order",
        "principal-mask overlap",
        "Visible changes avoid the origin's principal weights: RLVR most, OPD below chance, SFT least.",
        "principal_overlap",
        overlap("principal_overlap", "rlvr", "opd", "sft", above=False),
    ),
    Claim(
        "C5",
        "RQ1",
        "low_magnitude_order",
        "low-magnitude overlap",
        "Visible changes lie on small weights: RLVR most, then OPD, above chance, then SFT.",
        "low_magnitude_overlap",
        overlap("low_magnitude_overlap", "sft", "opd", "rlvr", above=True),
    ),
    Claim(
        "C6",
        "RQ2",
        "stable_rank_path",
        "stable rank over training",
        "SFT expands, OPD stays in a narrow low band, RLVR contracts to about OPD's end value.",
        "stable_rank",
        stable_rank_path,
    ),
    Claim(
        "C7",
        "RQ2",
        "norm_at_stable_rank",
        "update norm at comparable stable rank",
        "OPD's update is larger than RLVR's although it has about as many directions.",
        "update_norm",
        norm_at_stable_rank,
    ),
    Claim(
        "C7b",
        "RQ2",
        "norm_order",
        "update norm at the end",
        "The SFT update is largest, then OPD's, then RLVR's.",
        "update_norm",
        ordering(mean_of("update_norm"), "rlvr", "opd", "sft", ids=_UNMATCHED_NORM),
    ),
    Claim(
        "C8",
        "RQ2",
        "hill_trend",
        "Hill tail over training",
        "The tail index rises sharply in SFT, mildly in OPD, and falls in RLVR.",
        "hill_tail",
        hill_trend,
    ),
    Claim(
        "C9",
        "RQ2",
        "early_lock",
        "early subspace locking",
        "OPD's update is near its final subspace from the first checkpoint; SFT and RLVR approach theirs gradually.",
        "subspace_similarity",
        early_alignment,
    ),
    Claim(
        "C10",
        "RQ2",
        "projection",
        "training inside the locked subspace",
        "Training confined to the update's leading directions keeps what OPD gains and costs SFT part of its gain.",
        "projection",
        projection,
        first_speaks=True,
    ),
    Claim(
        "C11",
        "RQ3",
        "token_sparsification",
        "OPD on a share of the tokens",
        "OPD on a quarter or a half of each response's tokens keeps OPD's stable rank.",
        "token_sparsification",
        token_selection,
        first_speaks=True,
    ),
    Claim(
        "C12",
        "RQ3",
        "teacher_rollouts",
        "OPD on the teacher's responses",
        "OPD on responses that the teacher wrote keeps OPD's stable rank.",
        "teacher_rollouts",
        teacher_rollouts,
        first_speaks=True,
    ),
    Claim(
        "C13",
        "RQ3",
        "mixture",
        "mixture of OPD and RLVR",
        "A mixed signal keeps OPD's stable rank until OPD's weight in it is small.",
        "mixture",
        mixture,
        first_speaks=True,
    ),
    Claim(
        "C14",
        "RQ1",
        "variants",
        "stability over variants",
        "OPD's geometry is about the same with another teacher, student or domain.",
        "variants",
        stable_over_variants,
    ),
)


def decide_claims(folder: str | Path) -> list[dict[str, Any]]:
    """Decide every claim for a results folder and write ``claims.json`` into it, atomically.

    Returns:
        The entries as written; the package's docstring describes them.

    Raises:
        ValueError: if the folder is no results folder.
    """
    results = read_results(folder)
    entries = decide(results)
    write_json(results.root / "claims.json", entries)
    return entries


def decide(results: Results) -> list[dict[str, Any]]:
    """The same without writing."""
    return [_entry(claim, results) for claim in CLAIMS]


def _entry(claim: Claim, results: Results) -> dict[str, Any]:
    comparisons = [described(comparison) for comparison in claim.compare(results)]
    seen = [c for c in comparisons if c["shows_here"] != NOT_MEASURED]
    most = max(seen or comparisons, key=lambda c: len(c["runs"]))  # the earliest one of several
    speaker = comparisons[0] if claim.first_speaks else most
    return {
        "number": claim.number,
        "question": claim.question,
        "id": claim.id,
        "title": claim.title,
        "statement": claim.statement,
        "paper": {
            "values": REFERENCE[claim.reference],
            "model": PAPER_MODEL,
            "source": PAPER,
            "from_figures": claim.reference in FROM_FIGURES,
        },
        "comparisons": comparisons,
        "summary": speaker["id"],
        **{key: speaker[key] for key in _SPEAKS},
    }
