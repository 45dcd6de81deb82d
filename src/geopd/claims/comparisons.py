"""One way of looking at a claim, and how it reads in ``claims.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from geopd.claims.verdicts import (
    FAILED,
    HELD,
    NO_NULL,
    NOT_MEASURED,
    UNRESOLVED,
    Statement,
    combine,
    combine_beyond,
    combine_explained,
    combine_verdicts,
    judge,
)
from geopd.claims.wording import sentence


@dataclass(frozen=True)
class Comparison:
    """What a claim looks at in one setting: runs, numbers per run, those of one null, and the statements made of them.

    Attributes:
        id: unique in its claim, such as ``paper``, ``same_origin@accuracy`` or ``opd_k16``.
        label: plain words for the report.
        quantity: what ``values`` holds, with its setting.
        statements: the claim taken apart; all must hold (intersection-union).
        runs: the runs by role or arm, each in the order of their seeds.
        values: per run a number or a mapping of named numbers.
        null: name of the null that ``nulls`` (a number per run) holds.
        matched: ``end``, ``steps``, ``accuracy``, ``norm`` or None where the claim is about whole paths.
        matched_at: where the runs were read, such as ``{"step": {run: 63.5}, "level": {"0": 0.41}}``.
        left_out: runs of a needed kind that were not used.
        seeds: how many seeds have runs here, whether or not they could be compared.
        redrawn: whether each seed has an origin of its own; without it no verdict is given.
        missing: why a statement without values could not be looked at.
    """

    id: str
    label: str
    quantity: str
    statements: list[Statement]
    runs: dict[str, list[str]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    null: str | None = None
    nulls: dict[str, float] = field(default_factory=dict)
    matched: str | None = None
    matched_at: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    seeds: int = 0
    redrawn: bool = False
    missing: str | None = None


def described(comparison: Comparison) -> dict[str, Any]:
    """The comparison judged, with the fields that the package's docstring lists."""
    statements = [judge(s, comparison.seeds, comparison.redrawn) for s in comparison.statements]
    mine = {run for names in comparison.runs.values() for run in names}
    shows = combine([s["shows_here"] for s in statements], empty=NOT_MEASURED)
    verdict = combine_verdicts([s["verdict"] for s in statements])
    deciding = _deciding(statements, verdict)
    entry = {
        "id": comparison.id,
        "matched": comparison.matched,
        "matched_at": comparison.matched_at,
        "label": comparison.label,
        "runs": {role: names for role, names in comparison.runs.items() if names},
        "left_out": comparison.left_out,
        "quantity": comparison.quantity,
        "measured": {run: value for run, value in comparison.values.items() if run in mine},
        "null": comparison.null,
        "null_measured": {run: value for run, value in comparison.nulls.items() if run in mine},
        "statements": statements,
        "shows_here": shows,
        "null_shows": combine([s["null_shows"] for s in statements], empty=NO_NULL),
        "verdict": verdict,
        "beyond_null": combine_beyond([s["beyond_null"] for s in statements]),
        "explained": combine_explained([s["explained"] for s in statements]),
        "deciding": deciding["text"] if deciding else None,
        "estimate": deciding["estimate"] if deciding else None,
        "interval": deciding["interval"] if deciding else None,
        "seeds": max((len(s["values"]) for s in statements), default=0),
        "seeds_needed": _seeds_needed(statements, verdict),
        "reason": _reason(comparison, statements, shows, verdict),
    }
    return entry | {"sentence": sentence(entry)}


def _deciding(statements: list[dict[str, Any]], verdict: str) -> dict[str, Any] | None:
    """The statement that the verdict hangs on: among those with it, the one nearest to failing.

    That is the smallest distance from the decision line, in multiples of the interval's half-width where there is one.
    """
    known = [s for s in statements if s["verdict"] == verdict and s["estimate"] is not None]
    known = known or [s for s in statements if s["estimate"] is not None]
    return min(known, key=_room, default=None)


def _room(statement: dict[str, Any]) -> float:
    estimate, margin = float(statement["estimate"]), statement["margin"]
    room = estimate if margin is None else margin - abs(estimate)
    if statement["interval"] is None:
        return room
    half = (statement["interval"][1] - statement["interval"][0]) / 2
    return room / half if half else room * float("inf") if room else 0.0


def _seeds_needed(statements: list[dict[str, Any]], verdict: str) -> int | None:
    """The most that any unresolved statement needs; None where one of them cannot be said."""
    words = {s["verdict"] for s in statements}
    needs: list[int | None] = [s["seeds_needed"] for s in statements if s["verdict"] == UNRESOLVED]
    known = [n for n in needs if n is not None]
    if verdict != UNRESOLVED or NOT_MEASURED in words or len(known) < len(needs):
        return None
    return max(known)


def _reason(comparison: Comparison, statements: list[dict[str, Any]], shows: str, verdict: str) -> str | None:
    if comparison.missing and any(s["shows_here"] == NOT_MEASURED for s in statements):
        return comparison.missing
    if verdict == HELD:
        return None
    if verdict == FAILED:
        failed = next(s for s in statements if s["verdict"] == FAILED)
        of = "over seeds" if len(failed["values"]) > 1 else "of one seed, by the baselines' spread over seeds,"
        return f"the interval {of} excludes this: {failed['text']}"
    if shows == NOT_MEASURED:
        given = (s.reason for s in comparison.statements if s.reason)
        return next(given, "the metric, or enough checkpoints of it, was not measured")
    reason = next((s["reason"] for s in statements if s["verdict"] != HELD and s["reason"]), None)
    return f"{reason}; {comparison.missing}" if comparison.missing else reason
