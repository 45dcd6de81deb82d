"""A judged comparison in one or two sentences."""

from __future__ import annotations

from typing import Any

from geopd.claims.verdicts import EXPLAINED_WITHIN, FAILED, HELD, NO, NO_NULL, NOT_MEASURED, PARTLY, UNRESOLVED, YES

_NULL_NAMES = {
    "gaussian": "a Gaussian update of the same size",
    "permuted": "the same update, permuted among equally large weights,",
    "random_mask": "a random mask",
    "random_walk": "a random walk of the same length",
    "random_subspace": "a random subspace of the same dimension",
}
_SIZE_NULLS = ("gaussian", "permuted")


def sentence(entry: dict[str, Any]) -> str:
    """What a reader may take home of a comparison as it stands in ``claims.json``."""
    if entry["shows_here"] == NOT_MEASURED:
        return f"Not measured: {entry['reason']}."
    failing = [s["text"] for s in entry["statements"] if s["shows_here"] == NO]
    unmeasured = [s["text"] for s in entry["statements"] if s["shows_here"] == NOT_MEASURED]
    opening = {YES: "Shows here", PARTLY: "Shows in part", NO: "Does not show here"}[entry["shows_here"]]
    if entry["shows_here"] == PARTLY or unmeasured:
        parts = [f"not: {'; '.join(failing)}"] if failing else []
        parts += [f"not measured: {'; '.join(unmeasured)}"] if unmeasured else []
        opening += f" ({'. '.join(part[0].upper() + part[1:] if i else part for i, part in enumerate(parts))})"
    null = _NULL_NAMES.get(entry["null"], f"the null {entry['null']}")
    shown = entry["shows_here"] != NO
    matched = {
        YES: f"{', and' if shown else ', though'} {null} shows {'it too' if shown else 'it'}",
        PARTLY: f"; {null} shows part of it{' too' if shown else ''}",
        NO: f"; {null} does not show it" if shown else f", and {null} does not show it either",
        NO_NULL: "; no null shows or denies it",
    }[entry["null_shows"]]
    return f"{opening}{matched}.{_over_seeds(entry)}"


def _over_seeds(entry: dict[str, Any]) -> str:
    """The verdict in words, where there is one, and what the null leaves of it."""
    if entry["verdict"] == UNRESOLVED and entry["seeds_needed"]:
        return f" Over seeds: unresolved; about {entry['seeds_needed']} seeds would settle it either way."
    single = any(s["yardstick"] and len(s["values"]) == 1 for s in entry["statements"])
    over = "By one seed and the baselines' spread over seeds" if single else "Over seeds"
    if entry["verdict"] == FAILED:
        return f" {over}: did not hold."
    if entry["verdict"] != HELD:
        return ""
    by = "update size" if entry["null"] in _SIZE_NULLS else _NULL_NAMES.get(entry["null"], "its null").rstrip(",")
    if entry["explained"] == YES:
        beyond = f", all but under {100 * EXPLAINED_WITHIN:.0f}% of it" if entry["beyond_null"] == YES else ""
        return f" {over}: held, explained by {by}{beyond}."
    beyond = {
        YES: ", and beyond its null",
        NO: f", but its null shows even more of {_more_in_null(entry)}",
        UNRESOLVED: "; whether beyond its null is unresolved",
        NO_NULL: "",
    }[entry["beyond_null"]]
    return f" {over}: held{beyond}."


def _more_in_null(entry: dict[str, Any]) -> str:
    words = {s["text"]: s["beyond_null"] for s in entry["statements"] if s["beyond_null"] != NO_NULL}
    more = [text for text, word in words.items() if word == NO]
    return "it" if len(more) == len(words) else f"this: {'; '.join(more)}"
