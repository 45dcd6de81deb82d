"""Functional sufficiency: does training confined to the update's leading directions keep what free training gains?

An arm continues a baseline from one of its steps; the free arm does so without projection, and every other arm has the
same data, optimiser and number of steps. Accuracies are those at the arms' ends. What a random subspace of the same
dimension keeps or loses stands beside each number as its null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from geopd.claims.arms import CONTINUED, TITLES, Arm, Arms, Term, Width, gain, missing
from geopd.claims.comparisons import Comparison
from geopd.claims.tagged import ACCURACY, Score, redrawn
from geopd.claims.verdicts import Statement
from geopd.results import Results

MARGIN = 0.02
"""Declared beforehand: accuracy is kept if it is within two points."""
NULL = "random_subspace"
_BASES = {"random": "a random {k}-dimensional subspace", "origin": "the origin's own top {k}"}
WIDE, NARROW, EXACT = Width(16), Width(4), Width(16, "adapter")
EXPECTED = {
    ("keeps", "opd"): (WIDE, NARROW, EXACT),
    ("keeps", "sft"): (WIDE, NARROW, EXACT),
    ("keeps", "rlvr"): (WIDE,),
    ("difference", "sft"): (WIDE, NARROW, EXACT),
    ("random", "opd"): (WIDE, NARROW),
    ("random", "sft"): (WIDE, NARROW),
    ("random", "rlvr"): (WIDE,),
    ("origin", "opd"): (WIDE,),
    ("origin", "sft"): (WIDE,),
    ("keeps", CONTINUED): (),
    ("difference", CONTINUED): (),
    ("random", CONTINUED): (),
    ("origin", CONTINUED): (),
}
"""Comparisons that are listed whether or not their runs exist; those of other arms appear with their runs."""


def projection(results: Results) -> list[Comparison]:
    """Every comparison of the projection experiment; the first speaks for the claim."""
    arms = Arms(results)
    found = [_summary(arms)]
    for (kind, paradigm), expected in EXPECTED.items():
        rival = {"keeps": ("update", paradigm), "difference": ("update", "opd")}.get(kind, (kind, paradigm))
        known = arms.widths("update", paradigm) & arms.widths(*rival)
        for width in [*expected, *sorted(known - set(expected))]:
            if kind == "keeps":
                found.append(_keeps(arms, paradigm, width))
            elif kind == "difference":
                found.append(_difference(arms, paradigm, width))
            else:
                found.append(_against(arms, paradigm, kind, width))
    return found


def _summary(arms: Arms) -> Comparison:
    """All parts of the claim at the smallest K that distillation's own directions were tried with."""
    width = min((w for w in arms.widths("update", "opd") if w.mode == "gradient"), default=NARROW)
    parts = _keeps(arms, "opd", width), _difference(arms, "sft", width), _against(arms, "opd", "random", width)
    _, difference, _ = parts
    seeds = {run.name: run.seed for run in arms.runs}
    runs = {
        role: sorted({name for part in parts for name in part.runs.get(role, [])}, key=seeds.__getitem__)
        for role in {role: None for part in parts for role in part.runs}
    }
    used = {name for names in runs.values() for name in names}
    return replace(
        difference,
        id="summary",
        label=f"OPD is kept, SFT loses more, and OPD's V_{width.k} beats a random subspace ({width.words}: the "
        "tightest channel tried, the nearest counterpart of the paper's 16 of 4096)",
        statements=[statement for part in parts for statement in part.statements],
        runs=runs,
        values={name: value for part in parts for name, value in part.values.items()},
        matched_at={"step": {name: step for part in parts for name, step in part.matched_at["step"].items()}},
        left_out=sorted({name for part in parts for name in part.left_out} - used),
        seeds=max(part.seeds for part in parts),
        # A part with fewer than two seeds says nothing about origins.
        redrawn=all(part.redrawn for part in parts if len(part.statements[0].values) > 1),
        missing="; ".join(dict.fromkeys(part.missing for part in parts if part.missing)) or None,
    )


def _keeps(arms: Arms, paradigm: str, width: Width) -> Comparison:
    """One arm beside the free one: kept within the margin, or for SFT lost."""
    name, loses = TITLES[paradigm], paradigm in ("sft", CONTINUED)
    sign = -1 if loses else 1
    terms = Term(sign, paradigm, "update", width), Term(-sign, paradigm, "none")
    text = f"{name} in V_{width.k} ends " + (
        f"below free {name}" if loses else f"within {100 * MARGIN:g} points of free {name}"
    )
    label = f"{name} in V_{width.k} against free {name} ({width.words})"
    label += "; the paper says nothing of RLVR here" if paradigm == "rlvr" else ""
    return _comparison(arms, f"{paradigm}_{width.suffix}", label, text, terms, None if loses else MARGIN)


def _difference(arms: Arms, sft: str, width: Width) -> Comparison:
    """What SFT loses in its V_K minus what distillation loses in its own."""
    terms = (
        Term(1, sft, "none"),
        Term(-1, sft, "update", width),
        Term(-1, "opd", "none"),
        Term(1, "opd", "update", width),
    )
    text = f"{TITLES[sft]} loses more in its V_{width.k} than OPD in its own"
    label = f"what {TITLES[sft]} loses minus what OPD loses ({width.words})"
    where = "@same_origin" if sft == CONTINUED else ""
    return _comparison(arms, f"difference_{width.suffix}{where}", label, text, terms)


def _against(arms: Arms, paradigm: str, other: str, width: Width) -> Comparison:
    """V_K beside another basis of the same dimension, mode, learning rate and number of steps.

    Steps are not equally long: gradients have more energy in V_K, which Adam's scaling turns into shorter ones, so
    that random arms go further.
    """
    terms = Term(1, paradigm, "update", width), Term(-1, paradigm, other, width)
    basis = _BASES[other].format(k=width.k)
    text = f"{TITLES[paradigm]} ends higher in V_{width.k} than in {basis}"
    label = f"{TITLES[paradigm]}: V_{width.k} against {basis} ({width.words}; equal learning rate, not step length)"
    return _comparison(arms, f"{paradigm}_against_{other}_{width.suffix}", label, text, terms)


def _comparison(
    arms: Arms, id_: str, label: str, text: str, terms: tuple[Term, ...], margin: float | None = None
) -> Comparison:
    values = arms.total(terms)
    chance = _by_chance(terms)
    nulls = {seed: score for seed, score in (arms.total(chance) if chance else {}).items() if seed in values}
    undefined, unknown = gain(arms, terms, set(values))
    statement = Statement(
        text,
        {} if undefined else {seed: score.value for seed, score in values.items()},
        {} if undefined else {seed: score.value for seed, score in nulls.items()},
        margin=margin,
        contrast=margin is None and bool(nulls),
        reason=undefined or unknown,
        evaluation_interval=None if undefined else _over_problems(list(values.values())),
    )
    cast = {term.role: _of_seeds(arms.arm(term), values) for term in terms}
    null_cast = {term.role: _of_seeds(arms.arm(term), nulls) for term in chance}
    used = {run.name: run for arm in (null_cast | cast).values() for run in arm.values()}
    random = [run for term in chance if term.basis == "random" for run in null_cast[term.role].values()]
    return Comparison(
        id=id_,
        label=label,
        quantity=f"accuracy at the end, {ACCURACY[1]}",
        statements=[statement],
        runs={role: [run.name for run in arm.values()] for role, arm in (null_cast | cast).items()},
        values={name: arms.scores.described(run) for name, run in used.items()},
        null=NULL if nulls else None,
        nulls={run.name: arms.scores.described(run)[ACCURACY[0]] for run in random},
        matched="steps",
        matched_at={"step": {name: run.last for name, run in used.items()}},
        left_out=sorted(arms.everyone(terms) - set(used)),
        seeds=len({seed for term in terms for seed in arms.arm(term)}),
        redrawn=redrawn(*cast.values()),
        missing=None if values else missing(arms, terms),
    )


def _by_chance(terms: Sequence[Term]) -> list[Term]:
    """The same arms with a random subspace in place of the update's; none where another basis is the question."""
    if any(term.basis in _BASES for term in terms):
        return []
    return [replace(term, basis="random") if term.basis == "update" else term for term in terms]


def _of_seeds(arm: Arm, seeds: Mapping[int, Score]) -> Arm:
    return {seed: run for seed, run in arm.items() if seed in seeds}


def _over_problems(scores: Sequence[Score]) -> tuple[float, float] | None:
    """What another draw of problems would change in a single seed; several seeds have their own interval."""
    if len(scores) != 1:
        return None
    half = 1.96 * scores[0].se
    return scores[0].value - half, scores[0].value + half
