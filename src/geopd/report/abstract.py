"""The abstract: one paragraph per research question, put together from the verdicts in ``claims.json``."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from geopd.report.tables import show

QUESTIONS = {
    "RQ1": "Where in parameter space does on-policy distillation (OPD) lie, between SFT and RLVR?",
    "RQ2": "What path do OPD's updates take?",
    "RQ3": "What controls that path?",
}
ROLES = ("sft", "opd", "rlvr")
_NULLS = {
    "gaussian": "update size",
    "permuted": "a permuted update",
    "random_mask": "a random mask",
    "random_walk": "a random walk",
    "random_subspace": "a random subspace",
}
_OTHERWISE = {
    "same_origin": "from one origin",
    "same_origin@steps": "at equal steps",
    "same_origin@accuracy": "at equal accuracy",
    "same_origin@norm": "at equal update norm",
}
_SHOWN = {"yes": "shown", "partly": "shown in part", "no": "not shown"}
_MAX_ROLES = 4


def abstract(claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One paragraph per question: ``question``, ``text``, ``opening`` and ``sentences`` (``number``, ``id``, ``text``).

    Further views of a claim (``C1b``) are left to the tables. Empty for claims without questions.
    """
    found = []
    for question, text in QUESTIONS.items():
        mine = [c for c in claims if c.get("question") == question and str(c.get("number", ""))[-1:].isdigit()]
        if not mine:
            continue
        sentences = [
            {"number": claim["number"], "id": claim["id"], **claim_sentence(claim)}
            for claim in mine
            if claim["verdict"] != "not measured"
        ]
        found.append({"question": question, "text": text, "opening": opening(mine), "sentences": sentences})
    return found


def opening(claims: list[dict[str, Any]]) -> str:
    """How many of a question's claims came out which way, and how many of those that held the null explains."""
    measured = [c for c in claims if c["verdict"] != "not measured"]
    if not measured:
        return f"None of its {len(claims)} claims could be measured in this folder."
    held = [c for c in measured if c["verdict"] == "held"]
    open_ = [c for c in measured if c["verdict"] == "unresolved"]
    counted = [
        (len(held), "held" + _of_null(held)),
        (sum(c["verdict"] == "did not hold" for c in measured), "did not hold"),
        (len(open_), f"{'stays' if len(open_) == 1 else 'stay'} unresolved"),
        (len(claims) - len(measured), f"{'was' if len(claims) - len(measured) == 1 else 'were'} not measured"),
    ]
    text = f"Of {len(claims)} claims " + ", ".join(f"{n} {word}" for n, word in counted if n) + "."
    return text + _of_one_seed(measured)


def _of_one_seed(measured: list[dict[str, Any]]) -> str:
    """Which claims rest on one seed, and what it is held against."""
    one = [c for c in measured if _alone(c)]
    beside = [c for c in one if any(s.get("yardstick") for s in spokesman(c)["statements"])]
    rest = [c for c in one if c not in beside]
    text = ""
    if beside:
        text += f" {_listed(beside)} {_have(beside)}, set beside the spread that seeds give the baselines."
    if rest:
        text += f" {_listed(rest)} {_have(rest)} and no spread to set it beside: no verdict, only what it shows."
    return text


def _listed(claims: list[dict[str, Any]]) -> str:
    *first, last = [c["number"] for c in claims]
    return f"{', '.join(first)} and {last}" if first else str(last)


def _have(claims: list[dict[str, Any]]) -> str:
    return "has one seed" if len(claims) == 1 else "have one seed each"


def _alone(claim: dict[str, Any]) -> bool:
    return (claim.get("seeds") or 0) < 2


def _of_null(held: list[dict[str, Any]]) -> str:
    explained = sum(c.get("explained") == "yes" for c in held)
    beyond = sum(c.get("explained") != "yes" and c.get("beyond_null") == "yes" for c in held)
    parts = [f"{n} {word}" for n, word in ((explained, "explained by the null"), (beyond, "beyond it")) if n]
    return f" ({', '.join(parts)})" if parts else ""


def claim_sentence(claim: dict[str, Any]) -> dict[str, str]:
    """``claim``, the paper's statement, and ``text``: what was measured, the estimate that decides, the verdict."""
    summary = spokesman(claim)
    parts = [measured_text(summary), deciding_text(claim, summary), verdict_text(claim, summary)]
    said = "; ".join(part for part in parts if part)
    return {"claim": claim["statement"].rstrip("."), "text": f"{said}{otherwise_text(claim, summary)}."}


def spokesman(claim: dict[str, Any]) -> dict[str, Any]:
    """The comparison that speaks for a claim; the first measured one where the claim does not say."""
    comparisons = claim["comparisons"]
    named = [c for c in comparisons if c["id"] == claim.get("summary")]
    measured = [c for c in comparisons if c["shows_here"] != "not measured"]
    return dict(next(iter([*named, *measured, *comparisons]), {}))


def measured_text(comparison: dict[str, Any]) -> str:
    """Means over seeds of what was measured, role by role; empty where it is more than a number or two a role."""
    metric, measured = quantity(comparison), comparison["measured"]
    parts = []
    for role in roles_of(comparison):
        values = [measured[run] for run in comparison["runs"][role] if run in measured]
        label = role.upper() if role in ROLES else role.replace("_", " ")
        if values and all(isinstance(v, (int, float)) for v in values):
            parts.append(f"{label} {show(metric, fmean(values))}")
        elif values and all(isinstance(v, dict) and {"first", "last"} <= set(v) for v in values):
            first, last = (fmean(v[key] for v in values) for key in ("first", "last"))
            parts.append(f"{label} {first:.3g} → {last:.3g}")
    return ", ".join(parts) if 0 < len(parts) <= _MAX_ROLES else ""


def roles_of(comparison: dict[str, Any]) -> list[str]:
    """Roles or arms of a comparison, the paradigms first."""
    return sorted(comparison["runs"], key=lambda r: ROLES.index(r) if r in ROLES else len(ROLES))


def quantity(comparison: dict[str, Any]) -> str:
    """The metric's name behind a comparison's quantity, for writing its values."""
    name = str(comparison["quantity"]).split(" (")[0].replace(" ", "_").replace("visible_density", "update_sparsity")
    return "rotation" if name.startswith("mean_rotation") else name


def deciding_text(claim: dict[str, Any], summary: dict[str, Any]) -> str:
    """The statement nearest to the decision line, its estimate and in brackets its interval, at 95% or as said."""
    estimate, interval, text = claim.get("estimate"), claim.get("interval"), summary.get("deciding")
    if estimate is None or not text:
        return ""
    margin = next((s["margin"] for s in summary["statements"] if s["text"] == text), None)
    level = "" if margin is None else "; 90%"
    limits = "" if interval is None else f" [{interval[0]:.3g}, {interval[1]:.3g}{level}]"
    return f"{text}: {estimate:.3g}{limits}" + ("" if margin is None else f", margin {margin:.2g}")


def verdict_text(claim: dict[str, Any], summary: dict[str, Any]) -> str:
    """The verdict with the null's part; with one seed what that rests on, and what it shows where it is open."""
    null = _NULLS.get(str(summary.get("null")), "its null")
    by = " by one seed and the baselines' spread" if _alone(claim) else ""
    if claim["verdict"] == "held":
        beyond = {
            "yes": f", beyond {null}",
            "no": f", but {null} gives even more of it",
            "unresolved": f"; whether beyond {null} is unresolved",
        }.get(str(claim.get("beyond_null")), " (no null)")
        return f"held{by}" + (f", explained by {null}" if claim.get("explained") == "yes" else beyond)
    if claim["verdict"] == "did not hold":
        return f"did not hold{by}"
    needed = claim.get("seeds_needed")
    settled = f", about {needed} seeds would settle it either way" if needed else ""
    alone = {"yes": f", as {null} alone would", "partly": f", {null} alone would in part", "no": f", {null} would not"}
    if _alone(claim):
        shown = {"yes": "shows it", "partly": "shows it in part", "no": "does not show it"}[claim["shows_here"]]
        also = alone.get(claim["null_shows"], "") if claim["shows_here"] != "no" else ""
        return f"unresolved{settled}; one seed {shown}{also}"
    return f"unresolved{settled}"


def otherwise_text(claim: dict[str, Any], summary: dict[str, Any]) -> str:
    """Where the same claim, compared more strictly, comes out differently; empty where all agree."""
    mine, by_outcome = _outcome(claim, summary), dict[str, list[str]]()
    for comparison in claim["comparisons"]:
        place = _OTHERWISE.get(comparison["id"])
        if place and comparison["id"] != summary.get("id") and comparison["shows_here"] != "not measured":
            by_outcome.setdefault(_outcome(claim, comparison), []).append(place)
    parts = [f"{outcome} {', '.join(places)}" for outcome, places in by_outcome.items() if outcome != mine]
    return f"; {'; '.join(parts)}" if parts else ""


def _outcome(claim: dict[str, Any], comparison: dict[str, Any]) -> str:
    if _alone(claim) and comparison["verdict"] not in ("held", "did not hold"):
        return _SHOWN[comparison["shows_here"]]
    return str(comparison["verdict"])
