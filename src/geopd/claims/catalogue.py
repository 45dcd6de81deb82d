"""The claims, one per line of the paper's reference table, and how they are decided for a results folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geopd.claims.endpoints import (
    NAMES,
    Measured,
    mean_of,
    middle_layer_rotation,
    ordering,
    principal_overlap,
    visible_density,
)
from geopd.claims.roles import ROLES, Cast, casts
from geopd.claims.trajectories import early_lock, hill_trend, stable_rank_path
from geopd.claims.verdicts import (
    FAILED,
    HELD,
    NO,
    NO_NULL,
    NOT_MEASURED,
    PARTLY,
    UNRESOLVED,
    YES,
    combine,
    combine_beyond,
    combine_verdicts,
    judge,
)
from geopd.results import Results, read_results, write_json
from geopd.results.reference import FROM_FIGURES, PAPER, PAPER_MODEL, REFERENCE


@dataclass(frozen=True)
class Claim:
    """One line of the paper's reference table: what it says and the function that looks at it."""

    id: str
    title: str
    statement: str
    reference: str
    measure: Callable[[Results, Cast], Measured]


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "sparsity_order",
        "bf16 sparsity",
        "OPD leaves more weights visibly unchanged than SFT, RLVR more than OPD.",
        "update_sparsity",
        ordering(mean_of("update_sparsity"), "sft", "opd", "rlvr"),
    ),
    Claim(
        "density_order",
        "visible update density",
        "Per matrix, SFT visibly changes most weights, then OPD, then RLVR.",
        "visible_density",
        ordering(visible_density, "rlvr", "opd", "sft"),
    ),
    Claim(
        "low_magnitude_order",
        "low-magnitude overlap",
        "Visible changes lie on small weights: RLVR most, then OPD, then SFT.",
        "low_magnitude_overlap",
        ordering(mean_of("low_magnitude_overlap", alpha=0.3), "sft", "opd", "rlvr"),
    ),
    Claim(
        "principal_order",
        "principal-mask overlap",
        "Visible changes avoid the origin's principal weights: RLVR most, OPD below chance, SFT least.",
        "principal_overlap",
        principal_overlap,
    ),
    Claim(
        "rotation_order",
        "rotation of a representative layer",
        "SFT turns the middle layer's leading singular subspaces most, then OPD, then RLVR (mean over it).",
        "rotation",
        ordering(middle_layer_rotation, "rlvr", "opd", "sft"),
    ),
    Claim(
        "spectral_shift_order",
        "normalised spectral shift",
        "SFT moves the singular values most, then OPD, then RLVR (only the order is looked at).",
        "spectral_shift",
        ordering(mean_of("spectral_shift"), "rlvr", "opd", "sft"),
    ),
    Claim(
        "norm_order",
        "update norm at the end",
        "The SFT update is largest, then OPD's, then RLVR's.",
        "update_norm",
        ordering(mean_of("update_norm"), "rlvr", "opd", "sft"),
    ),
    Claim(
        "hill_trend",
        "Hill tail over training",
        "The tail index rises sharply in SFT, mildly in OPD, and falls in RLVR.",
        "hill_tail",
        hill_trend,
    ),
    Claim(
        "stable_rank_path",
        "stable rank over training",
        "SFT expands, OPD stays in a narrow low band, RLVR contracts to about OPD's end value.",
        "stable_rank",
        stable_rank_path,
    ),
    Claim(
        "early_lock",
        "early subspace locking",
        "OPD's update is near its final subspace from the first checkpoint; SFT and RLVR approach theirs gradually.",
        "subspace_similarity",
        early_lock,
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
    both = casts(results)
    return [_entry(claim, results, both) for claim in CLAIMS]


def _entry(claim: Claim, results: Results, both: list[Cast]) -> dict[str, Any]:
    comparisons = [_compare(claim, results, cast) for cast in both]
    seen = [c for c in comparisons if c["shows_here"] != NOT_MEASURED]
    first = max(seen or comparisons, key=lambda c: len(c["runs"]))  # the earlier one where both are complete
    return {
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
        **{key: first[key] for key in ("shows_here", "null_shows", "verdict", "reason", "sentence")},
    }


def _compare(claim: Claim, results: Results, cast: Cast) -> dict[str, Any]:
    measured = claim.measure(results, cast)
    statements = [judge(statement, len(cast.seeds), cast.redrawn) for statement in measured.statements]
    runs = {role: cast.runs(role) for role in ROLES if cast.runs(role)}
    mine = {run for names in runs.values() for run in names}
    shows = combine([s["shows_here"] for s in statements], empty=NOT_MEASURED)
    null_shows = combine([s["null_shows"] for s in statements], empty=NO_NULL)
    verdict = combine_verdicts([s["verdict"] for s in statements])
    entry = {
        "id": cast.id,
        "label": cast.label,
        "runs": runs,
        "left_out": cast.left_out,
        "quantity": measured.quantity,
        "measured": {run: value for run, value in measured.values.items() if run in mine},
        "null": measured.null,
        "null_measured": {run: value for run, value in measured.nulls.items() if run in mine},
        "statements": statements,
        "shows_here": shows,
        "null_shows": null_shows,
        "verdict": verdict,
        "beyond_null": combine_beyond([s["beyond_null"] for s in statements]),
        "reason": _reason(cast, statements, shows, verdict, results),
    }
    return entry | {"sentence": _sentence(entry)}


def _reason(cast: Cast, statements: list[dict[str, Any]], shows: str, verdict: str, results: Results) -> str | None:
    if cast.missing and (shows == NOT_MEASURED or any(s["shows_here"] == NOT_MEASURED for s in statements)):
        paradigms = {str(p) for p in results.runs["paradigm"]}
        wanted = ", ".join(NAMES[role] for role in cast.missing)
        if cast.missing == ["sft"] and "sft" in paradigms:
            where = "the same origin" if cast.id == "same_origin" else "another origin (the base)"
            return f"no SFT run from {where}"
        here = ", ".join(sorted(paradigms)) or "none"
        return f"no measured run for {wanted}; the folder's paradigms: {here} (`--paradigm label=...` names one)"
    if shows == NOT_MEASURED:
        return "the metric, or enough checkpoints of it, was not measured"
    if verdict == HELD:
        return None
    return next((s["reason"] for s in statements if s["reason"]), None)


_NULL_NAMES = {
    "gaussian": "a Gaussian update of the same size",
    "permuted": "the same update, permuted among equally large weights,",
    "random_mask": "a random mask",
    "random_walk": "a random walk of the same length",
}


def _sentence(entry: dict[str, Any]) -> str:
    """What a reader may take home, in one line."""
    if entry["shows_here"] == NOT_MEASURED:
        return f"Not measured: {entry['reason']}."
    failing = [s["text"] for s in entry["statements"] if s["shows_here"] == NO]
    unmeasured = [s["text"] for s in entry["statements"] if s["shows_here"] == NOT_MEASURED]
    opening = {YES: "Shows here", PARTLY: "Shows in part", NO: "Does not show here"}[entry["shows_here"]]
    if entry["shows_here"] == PARTLY:
        parts = [f"not: {'; '.join(failing)}"] if failing else []
        parts += [f"not measured: {'; '.join(unmeasured)}"] if unmeasured else []
        opening += f" ({' — '.join(parts)})"
    null = _NULL_NAMES.get(entry["null"], f"the null {entry['null']}")
    shown = entry["shows_here"] != NO
    matched = {
        YES: f"{', and' if shown else ', though'} {null} shows {'it too' if shown else 'it'}",
        PARTLY: f"; {null} shows part of it{' too' if shown else ''}",
        NO: f"; {null} does not show it" if shown else f", and neither does it with {null}",
        NO_NULL: "; no null shows or denies it: what chance does to this comparison has no closed form here",
    }[entry["null_shows"]]
    return f"{opening}{matched}.{_over_seeds(entry)}"


def _over_seeds(entry: dict[str, Any]) -> str:
    """The verdict in words, where there is one, and whether it goes beyond the null."""
    if entry["verdict"] not in (HELD, FAILED):
        return ""
    beyond = {
        YES: ", and beyond its null",
        NO: ", but its null shows even more of it",
        UNRESOLVED: "; whether beyond its null is unresolved",
        NO_NULL: "",
    }[entry["beyond_null"]]
    return f" Over seeds: {entry['verdict']}{beyond}."
