"""From per-seed numbers to words: what shows here, whether the null shows it too, and what seeds allow to be said."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log
from typing import Any

from geopd.results.statistics import explained_share, replicates_needed, t_interval, t_interval_of, within_share

YES, NO, PARTLY, NOT_MEASURED, NO_NULL = "yes", "no", "partly", "not measured", "no null"
HELD, FAILED, UNRESOLVED = "held", "did not hold", "unresolved"
EXPLAINED_WITHIN = 0.2
"""Declared beforehand: a null explains a contrast if what it leaves over is shown to be within ±20% of the contrast."""
ONE_SEED = "one seed: a verdict needs several, each with its own base and anchor"


@dataclass(frozen=True)
class Statement:
    """One testable part of a claim: per seed a number that the claim says is positive, or lies within ``±margin``.

    Attributes:
        text: what is said, such as ``SFT < OPD``.
        values: the number by seed; empty where it could not be measured.
        nulls: the same number of the matched null, by seed.
        margin: makes it an equivalence: the number lies within ``±margin``, declared beforehand.
        contrast: marks log ratios of two values, for which an explained share makes sense.
        reason: keeps the statement unresolved whatever the seeds say; without values, says why there are none.
        evaluation_interval: 95% interval of the number over resampled problems inside one seed; described, not judged.
        yardstick: for a single value ``(sd, degrees of freedom)`` of such numbers between seeds, known from other runs:
            stands in for the spread that one seed cannot show.
    """

    text: str
    values: dict[int, float]
    nulls: dict[int, float] = field(default_factory=dict)
    margin: float | None = None
    contrast: bool = False
    reason: str | None = None
    evaluation_interval: tuple[float, float] | None = None
    yardstick: tuple[float, int] | None = None


def order(text: str, low: dict[int, float], high: dict[int, float], **nulls: dict[int, float]) -> Statement:
    """``low < high`` as the log ratio per seed; ``nulls`` are ``null_low`` and ``null_high``.

    Where some of the numbers, the nulls' among them, are not positive, all seeds compare by difference instead.
    """
    null_low, null_high = nulls.get("null_low", {}), nulls.get("null_high", {})
    pairs, null_pairs = _pairs(low, high), _pairs(null_low, null_high)
    logs = all(min(pair) > 0 for pair in (*pairs.values(), *null_pairs.values()))
    return Statement(text, _contrast(pairs, logs), _contrast(null_pairs, logs), contrast=True)


def _pairs(low: dict[int, float], high: dict[int, float]) -> dict[int, tuple[float, float]]:
    return {seed: (low[seed], high[seed]) for seed in sorted(low.keys() & high.keys())}


def _contrast(pairs: dict[int, tuple[float, float]], logs: bool) -> dict[int, float]:
    return {seed: log(high / low) if logs else high - low for seed, (low, high) in pairs.items()}


def judge(statement: Statement, seeds: int, redrawn: bool) -> dict[str, Any]:
    """A statement as it stands in ``claims.json``; see the package's docstring for the fields.

    Args:
        statement: the numbers by seed.
        seeds: how many seeds the comparison has runs of.
        redrawn: whether each seed has an origin of its own.
    """
    values, nulls = list(statement.values.values()), statement.nulls
    estimate = sum(values) / len(values) if values else None
    null_estimate = sum(nulls.values()) / len(nulls) if nulls else None
    verdict, interval, reason = _verdict(values, statement, seeds, redrawn)
    if statement.reason:
        verdict = UNRESOLVED
        reason = statement.reason if len(values) > 1 or not reason else f"{reason}; and {statement.reason}"
    common = sorted(statement.values.keys() & nulls.keys())
    beyond, against = [statement.values[s] - nulls[s] for s in common], [statement.values[s] for s in common]
    share = None
    if statement.contrast and common:  # of the seeds that have both
        share = explained_share(sum(against), sum(nulls[s] for s in common))
    single = statement.yardstick[0] if len(values) == 1 and statement.yardstick else None
    known = single is not None or (redrawn and len(values) > 1)
    needed = replicates_needed(values, margin=statement.margin, spread=single) if known else None
    return {
        "text": statement.text,
        "values": {str(seed): value for seed, value in sorted(statement.values.items())},
        "shows_here": NOT_MEASURED if estimate is None else _yes(_shows(estimate, statement.margin)),
        "estimate": estimate,
        "interval": interval,
        "evaluation_interval": None if statement.evaluation_interval is None else list(statement.evaluation_interval),
        "yardstick": None if statement.yardstick is None else list(statement.yardstick),
        "margin": statement.margin,
        "null_estimate": null_estimate,
        "null_shows": NO_NULL if null_estimate is None else _yes(_shows(null_estimate, statement.margin)),
        "verdict": NOT_MEASURED if estimate is None else verdict,
        "beyond_null": _beyond(beyond, statement, redrawn),
        "explained_share": share,
        "explained": _explained(beyond, against, statement, redrawn),
        "seeds_needed": needed if verdict == UNRESOLVED and not statement.reason else None,
        "reason": reason if estimate is not None else statement.reason or "a run or value it needs is missing",
    }


def _yes(shows: bool) -> str:
    return YES if shows else NO


def _shows(estimate: float, margin: float | None) -> bool:
    return estimate > 0 if margin is None else abs(estimate) < margin


def _verdict(
    values: list[float], statement: Statement, seeds: int, redrawn: bool
) -> tuple[str, list[float] | None, str | None]:
    margin = statement.margin
    level = 0.95 if margin is None else 0.90  # for equivalence the two one-sided tests at 5% each
    if len(values) == 1 and statement.yardstick is not None:
        interval = t_interval_of(values[0], *statement.yardstick, level)
    elif len(values) < 2:
        return UNRESOLVED, None, ONE_SEED if seeds < 2 else "fewer than two seeds allow this comparison"
    elif not redrawn:
        return UNRESOLVED, None, "the seeds share an origin, so they are not independent replicates"
    else:
        interval = t_interval(values, level)
    ends = [interval.low, interval.high]
    if margin is not None:
        apart = interval.low > margin or interval.high < -margin
        word = HELD if interval.within(margin) else FAILED if apart else UNRESOLVED
    else:
        word = {1: HELD, -1: FAILED, 0: UNRESOLVED}[interval.sign]
    if word != UNRESOLVED:
        return word, ends, None
    of = "over seeds" if len(values) > 1 else "of one seed, by the spread between seeds of the baselines,"
    return word, ends, f"the interval {of} does not settle it"


def _beyond(differences: list[float], statement: Statement, redrawn: bool) -> str:
    # An equivalence claims no ordering that could go beyond anything.
    if not differences or statement.margin is not None:
        return NO_NULL
    if statement.reason or len(differences) < 2 or not redrawn:
        return UNRESOLVED
    return {1: YES, -1: NO, 0: UNRESOLVED}[t_interval(differences).sign]


def _explained(differences: list[float], contrasts: list[float], statement: Statement, redrawn: bool) -> str:
    if not differences or not statement.contrast or statement.margin is not None:
        return NO_NULL
    if statement.reason or len(differences) < 2 or not redrawn:
        return NO
    return _yes(within_share(differences, contrasts, EXPLAINED_WITHIN))


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


def combine_explained(words: list[str]) -> str:
    """Explained if the null has every contrast that has a null."""
    known = [word for word in words if word != NO_NULL]
    return _yes(all(word == YES for word in known)) if known else NO_NULL
