"""``claims.json`` as the page shows it: the abstract, an overview by question, and every comparison."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from geopd.report.abstract import QUESTIONS, ROLES, abstract, quantity, roles_of
from geopd.report.tables import show
from geopd.results import Results

_LATER = {"seeds": None, "seeds_needed": None, "beyond_null": "", "number": "", "question": "", "explained": "no null"}
"""Fields that folders of earlier versions do not have."""
_OPEN = 2
"""Comparisons of a claim shown without being asked for."""


def claims_table(results: Results) -> dict[str, Any]:
    """The claims by question with their numbers written out, the abstract, and what most reasons have in common."""
    statements = [s for claim in results.claims for c in claim["comparisons"] for s in c["statements"]]
    reasons = [s["reason"] for s in statements if s["verdict"] == "unresolved"]
    common = max(sorted(set(filter(None, reasons))), key=reasons.count, default="")
    lines = [_LATER | claim | _shown(claim) for claim in results.claims]
    questions = list(dict.fromkeys(line["question"] for line in lines))
    return {
        "lines": lines,
        "sections": [
            {
                "question": question,
                "text": QUESTIONS.get(question, ""),
                "lines": [line for line in lines if line["question"] == question],
            }
            for question in sorted(questions)
        ],
        "abstract": abstract(results.claims),
        "common_reason": common,
        "nothing": all(claim["shows_here"] == "not measured" for claim in results.claims),
    }


def _shown(claim: dict[str, Any]) -> dict[str, Any]:
    """The comparisons written out: what speaks for the claim and one beside it, the others, and the stricter ones.

    A comparison is a stricter one where it takes another comparison's runs at a matched point.
    """
    every = [_LATER | c | {"numbers": numbers(c), "parts": parts(c), "place": _place(c)} for c in claim["comparisons"]]
    plain = [c for c in every if "@" not in c["id"]]
    plain.sort(key=lambda c: c["id"] != claim.get("summary"))
    return {
        "comparisons": plain[:_OPEN],
        "folded": plain[_OPEN:],
        "matched": [c for c in every if "@" in c["id"]],
    }


def _place(comparison: dict[str, Any]) -> str:
    own = ", the paper's own" if str(comparison["id"]).startswith("paper") else ""
    return f"{comparison.get('matched')}{own}"


def numbers(comparison: dict[str, Any]) -> list[dict[str, str]]:
    """One line per role or arm: each seed's number, or the means of several numbers, and the null's mean."""
    metric = quantity(comparison)
    measured, nulls = comparison["measured"], comparison["null_measured"]
    lines = []
    for role in roles_of(comparison):
        runs = [run for run in comparison["runs"][role] if run in measured]
        if not runs:
            continue
        expected = [nulls[run] for run in runs if run in nulls]
        label = role.upper() if role in ROLES else role.replace("_", " ")
        name = runs[0] if len(runs) == 1 else f"{label}, {len(runs)} seeds"
        null = f"null {show(metric, fmean(expected))}" if expected else ""
        lines.append({"run": name, "value": _value(metric, [measured[run] for run in runs]), "null": null})
    return lines


def _value(metric: str, values: list[Any]) -> str:
    if not all(isinstance(value, dict) for value in values):
        return ", ".join(show(metric, value) for value in values)
    if all({"first", "last"} <= set(value) for value in values):
        return ", ".join(f"{value['first']:.3g} → {value['last']:.3g}" for value in values)
    known = {key: [v[key] for v in values if v.get(key) is not None] for key in values[0]}
    about = "mean " if len(values) > 1 else ""
    return about + ", ".join(f"{key.replace('_', ' ')} {_number(fmean(v) if v else None)}" for key, v in known.items())


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def parts(comparison: dict[str, Any]) -> list[dict[str, str]]:
    """A claim's statements with their estimates, intervals and nulls written out."""
    return [
        {
            "text": s["text"] + (f" (± {s['margin']:.2g})" if s["margin"] is not None else ""),
            "estimate": _number(s["estimate"]),
            "interval": "–" if s["interval"] is None else " to ".join(map(_number, s["interval"])),
            "kind": _kind(s),
            "null": _number(s["null_estimate"]),
            "share": _share(s["explained_share"]),
        }
        for s in comparison["statements"]
    ]


def _kind(statement: dict[str, Any]) -> str:
    """Level and kind of a statement's interval; empty where it has none."""
    if statement["interval"] is None:
        return ""
    level = "95%" if statement["margin"] is None else "90%"
    seeds = len(statement["values"])
    return f"{level}, " + (f"{seeds} seeds" if seeds > 1 else "one seed by the baselines' spread")


def _share(explained: float | None) -> str:
    """A share of the contrast; outside 0 to 1 digits say nothing: the null has more than all of it, or the opposite."""
    if explained is None:
        return "–"
    return "over 100%" if explained > 1 else "none" if explained < 0 else f"{100 * explained:.0f}%"
