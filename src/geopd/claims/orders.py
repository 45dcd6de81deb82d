"""Claims about where runs end: which of them has more, at their ends, at equal steps, accuracy and update norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from geopd.claims.comparisons import Comparison
from geopd.claims.endpoints import NAMES, Endpoint, Numbers, by_seed, mean_of
from geopd.claims.interpolation import Curve, curves
from geopd.claims.matching import (
    UNDEFINED_DRAWS,
    Match,
    Matching,
    at_equal_accuracy,
    at_equal_norm,
    at_equal_steps,
)
from geopd.claims.roles import ROLES, Cast, casts, missing_roles
from geopd.claims.verdicts import Statement, order
from geopd.results import Results

State = Callable[[list[Numbers], Cast], list[Statement]]
"""What is said of the numbers of one comparison."""

MATCHINGS: dict[str, tuple[str, Matching]] = {
    "steps": ("at equal training steps", at_equal_steps),
    "accuracy": ("at equal accuracy", at_equal_accuracy),
    "norm": ("at equal update norm", at_equal_norm),
}
EVERYWHERE = ("paper", "same_origin", "same_origin@steps", "same_origin@accuracy", "same_origin@norm", "paper@norm")
BAND = float(np.log(1.15))
"""Equivalence margin of stable rank, declared beforehand: within 15% as a log ratio."""


def ordering(endpoint: Endpoint, *ranks: str, ids: Sequence[str] = EVERYWHERE) -> Callable[[Results], list[Comparison]]:
    """A claim that the roles named in ``ranks`` come in this rising order, pair by neighbouring pair."""
    return lambda results: compare(results, [endpoint], lambda n, cast: ordered(n[0], cast, ranks), ids=ids)


def overlap(metric: str, *ranks: str, above: bool) -> Callable[[Results], list[Comparison]]:
    """The same of a mask overlap, and OPD above or below the overlap ``alpha`` of a uniformly random mask."""
    endpoint = mean_of(metric, alpha=0.3)

    def state(numbers: list[Numbers], cast: Cast) -> list[Statement]:
        statements, alpha = ordered(numbers[0], cast, ranks), numbers[0].parameter("alpha")
        if alpha is None:
            return statements
        opd, null = (by_seed(cast, "opd", values) for values in (numbers[0].values, numbers[0].nulls))
        chance, null_chance = dict.fromkeys(opd, alpha), dict.fromkeys(null, alpha)
        text = f"OPD {'>' if above else '<'} {alpha:g}, the overlap of a random mask"
        low, high = (chance, opd) if above else (opd, chance)
        null_low, null_high = (null_chance, null) if above else (null, null_chance)
        return [*statements, order(text, low, high, null_low=null_low, null_high=null_high)]

    return lambda results: compare(results, [endpoint], state)


def ordered(numbers: Numbers, cast: Cast, ranks: Sequence[str]) -> list[Statement]:
    """One statement for each neighbouring pair of ``ranks``."""
    return [
        order(
            f"{NAMES[low]} < {NAMES[high]}",
            by_seed(cast, low, numbers.values),
            by_seed(cast, high, numbers.values),
            null_low=by_seed(cast, low, numbers.nulls),
            null_high=by_seed(cast, high, numbers.nulls),
        )
        for low, high in pairwise(ranks)
    ]


def norm_at_stable_rank(results: Results) -> list[Comparison]:
    """OPD's update is larger than RLVR's while their stable ranks are within 15% of each other.

    The stable rank is the one without rounding noise where the folder has it for both runs.
    """
    denoised = set(results.measurements["metric"]) & {"stable_rank_denoised"}
    rank = mean_of("stable_rank_denoised" if denoised else "stable_rank")

    def state(numbers: list[Numbers], cast: Cast) -> list[Statement]:
        norms, ranks = numbers
        opd, rlvr = (by_seed(cast, role, ranks.values) for role in ("opd", "rlvr"))
        near = order("stable ranks within 15%", rlvr, opd)
        shaky = not denoised or not ranks.unresolved.isdisjoint(cast.everyone)
        reason = "the stable rank without rounding noise is not resolved for every matrix" if shaky else None
        return [*ordered(norms, cast, ("rlvr", "opd")), replace(near, margin=BAND, contrast=False, reason=reason)]

    ids = ("same_origin", "same_origin@steps", "same_origin@accuracy")
    return compare(results, [mean_of("update_norm"), rank], state, ids=ids, roles=("opd", "rlvr"))


def compare(
    results: Results,
    endpoints: Sequence[Endpoint],
    state: State,
    *,
    ids: Sequence[str] = EVERYWHERE,
    roles: Sequence[str] = ROLES,
) -> list[Comparison]:
    """The same statements in each comparison ``cast`` or ``cast@matching`` that ``ids`` names."""
    both = {cast.id: cast.of(roles) for cast in casts(results)}
    runs = {run for cast in both.values() for run in cast.everyone}
    read = [curves(results, endpoint, runs) for endpoint in endpoints]
    return [_comparison(results, both[id_.split("@")[0]], id_, read, state, roles) for id_ in ids]


def _comparison(
    results: Results,
    cast: Cast,
    id_: str,
    read: list[tuple[Numbers, dict[str, Curve]]],
    state: State,
    roles: Sequence[str],
) -> Comparison:
    numbers, label, missing = [end for end, _ in read], cast.label, missing_roles(results, cast, roles)
    matched, match = "end", Match()
    if "@" in id_:
        matched = id_.split("@")[1]
        text, find = MATCHINGS[matched]
        match, label = find(results, cast, roles), f"{label}, {text}"
        numbers = [_read_at(end, lines, match.steps) for end, lines in read]
        missing = missing or "; ".join(dict.fromkeys(match.reasons)) or None
    statements = _with_draws(state(numbers, cast), [state(n, cast) for n in _drawn(read, match)])
    single = len(numbers) == 1
    return Comparison(
        id=id_,
        label=label,
        quantity=" and ".join(n.quantity for n in numbers),
        statements=statements,
        runs={role: cast.runs(role) for role in roles},
        values=dict(numbers[0].values) if single else _named(numbers),
        null=numbers[0].null,
        nulls=numbers[0].nulls,
        matched=matched,
        matched_at=_matched_at(match) if matched != "end" else {},
        left_out=cast.left_out,
        seeds=len(cast.seeds),
        redrawn=cast.redrawn,
        missing=missing,
    )


def _named(numbers: list[Numbers]) -> dict[str, dict[str, float]]:
    runs = sorted({run for n in numbers for run in n.values})
    names = [n.quantity.split(" (")[0] for n in numbers]
    return {
        run: {name: n.values[run] for name, n in zip(names, numbers, strict=True) if run in n.values} for run in runs
    }


def _matched_at(match: Match) -> dict[str, object]:
    found: dict[str, object] = {"step": match.steps, "level": {str(s): level for s, level in match.levels.items()}}
    if match.draws:
        undefined = sum(len(draw) < len(match.steps) for draw in match.draws)
        found["undefined_draws"] = undefined / len(match.draws)
    return found


def _read_at(end: Numbers, lines: dict[str, Curve], steps: dict[str, float]) -> Numbers:
    known = {run: (lines[run], step) for run, step in steps.items() if run in lines}
    values = {run: value for run, (curve, step) in known.items() if (value := curve.at(step)) is not None}
    nulls = {run: value for run, (curve, step) in known.items() if (value := curve.at(step, null=True)) is not None}
    shaky = {run for run, (curve, step) in known.items() if curve.stretch(step) in curve.unresolved}
    return replace(end, values=values, nulls=nulls, unresolved=frozenset(shaky))


def _drawn(read: list[tuple[Numbers, dict[str, Curve]]], match: Match) -> list[list[Numbers]]:
    complete = [draw for draw in match.draws if len(draw) == len(match.steps)]
    if len(complete) < (1 - UNDEFINED_DRAWS) * len(match.draws):
        return []
    return [[_read_at(end, lines, draw) for end, lines in read] for draw in complete]


def _with_draws(statements: list[Statement], draws: list[list[Statement]]) -> list[Statement]:
    """The statements with the central 95% of what resampled problems make of their numbers."""
    found = []
    for i, statement in enumerate(statements):
        drawn = [value for draw in draws for value in draw[i].values.values()]
        interval = None
        if drawn and statement.values:
            low, high = (float(q) for q in np.quantile(drawn, (0.025, 0.975)))
            interval = (low, high)
        found.append(replace(statement, evaluation_interval=interval))
    return found
