"""From per-seed numbers to words: what shows here, whether the null shows it too, and what seeds allow to be said."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log
from typing import Any

from geopd.results.statistics import explained_share, t_interval

YES, NO, PARTLY, NOT_MEASURED, NO_NULL = "yes", "no", "partly", "not measured", "no null"
HELD, FAILED, UNRESOLVED = "held", "did not hold", "unresolved"


@dataclass(frozen=True)
class Statement:
    """One testable part of a claim: per seed a number that the claim says is positive, or lies within ``±margin``.

    ``nulls`` holds the same number of the matched null, ``contrast`` marks log ratios of two values, for which an
    explained share makes sense, and ``reason`` keeps a statement unresolved whatever the seeds say.
    """

    text: str
    values: dict[int, float]
    nulls: dict[int, float] = field(default_factory=dict)
    margin: float | None = None
    contrast: bool = False
    reason: str | None = None


def order(text: str, low: dict[int, float], high: dict[int, float], **nulls: dict[int, float]) -> Statement:
    """``low < high`` as the log ratio per seed; ``nulls`` are ``null_low`` and ``null_high``.

    Values that are not both positive have no log ratio: those seeds compare by their difference instead.
    """
    null_low, null_high = nulls.get("null_low", {}), nulls.get("null_high", {})
    return Statement(text, _contrast(low, high), _contrast(null_low, null_high), contrast=True)


def _contrast(low: dict[int, float], high: dict[int, float]) -> dict[int, float]:
    both = sorted(low.keys() & high.keys())
    positive = all(min(low[s], high[s]) > 0 for s in both)
    return {s: log(high[s] / low[s]) if positive else high[s] - low[s] for s in both}


def judge(statement: Statement, seeds: int, redrawn: bool) -> dict[str, Any]:
    """A statement as it stands in ``claims.json``; see the package's docstring for the fields."""
    values, nulls = list(statement.values.values()), statement.nulls
    estimate = sum(values) / len(values) if values else None
    null_estimate = sum(nulls.values()) / len(nulls) if nulls else None
    verdict, interval, reason = _verdict(values, statement.margin, redrawn)
    if len(values) < 2 <= seeds:
        reason = "fewer than two seeds allow this comparison"
    if statement.reason and len(values) > 1:
        verdict, reason = UNRESOLVED, statement.reason
    common = sorted(statement.values.keys() & nulls.keys())
    beyond = [statement.values[s] - nulls[s] for s in common]
    explained = None
    if statement.contrast and estimate is not None and null_estimate is not None:
        explained = explained_share(estimate, null_estimate)
    return {
        "text": statement.text,
        "shows_here": NOT_MEASURED if estimate is None else _yes(_shows(estimate, statement.margin)),
        "estimate": estimate,
        "interval": interval,
        "margin": statement.margin,
        "null_estimate": null_estimate,
        "null_shows": NO_NULL if null_estimate is None else _yes(_shows(null_estimate, statement.margin)),
        "verdict": NOT_MEASURED if estimate is None else verdict,
        "beyond_null": _beyond(beyond, statement.margin, redrawn),
        "explained_share": explained,
        "reason": reason if estimate is not None else "a run or value it needs is missing",
    }


def _yes(shows: bool) -> str:
    return YES if shows else NO


def _shows(estimate: float, margin: float | None) -> bool:
    return estimate > 0 if margin is None else abs(estimate) < margin


def _verdict(values: list[float], margin: float | None, redrawn: bool) -> tuple[str, list[float] | None, str | None]:
    if len(values) < 2:
        return UNRESOLVED, None, "one seed: a verdict needs several, each with its own base and anchor"
    if not redrawn:
        return UNRESOLVED, None, "the seeds share an origin, so they are not independent replicates"
    # 90% for equivalence: the two one-sided tests at 5% each.
    interval = t_interval(values, 0.95 if margin is None else 0.90)
    ends = [interval.low, interval.high]
    if margin is not None:
        apart = interval.low > margin or interval.high < -margin
        word = HELD if interval.within(margin) else FAILED if apart else UNRESOLVED
    else:
        word = {1: HELD, -1: FAILED, 0: UNRESOLVED}[interval.sign]
    return word, ends, "the interval over seeds does not settle it" if word == UNRESOLVED else None


def _beyond(differences: list[float], margin: float | None, redrawn: bool) -> str:
    if not differences:
        return NO_NULL
    if margin is not None or len(differences) < 2 or not redrawn:
        return UNRESOLVED
    return {1: YES, -1: NO, 0: UNRESOLVED}[t_interval(differences).sign]


def combine(words: list[str], *, empty: str) -> str:
    """``yes``, ``partly`` or ``no`` over a claim's statements; ``empty`` where none of them could be looked at.

    Statements that could not be looked at keep the whole from being ``yes``.
    """
    known = [word for word in words if word in (YES, NO)]
    if not known:
        return empty
    if all(word == NO for word in known):
        return NO
    return YES if all(word == YES for word in words) else PARTLY


def combine_verdicts(words: list[str]) -> str:
    """Held if every statement held, did not hold if one did not, else unresolved."""
    if all(word == NOT_MEASURED for word in words):
        return NOT_MEASURED
    if FAILED in words:
        return FAILED
    return HELD if all(word == HELD for word in words) else UNRESOLVED


def combine_beyond(words: list[str]) -> str:
    """Beyond the null if every statement with a null is."""
    known = [word for word in words if word != NO_NULL]
    if not known:
        return NO_NULL
    if NO in known:
        return NO
    return YES if all(word == YES for word in known) else UNRESOLVED
