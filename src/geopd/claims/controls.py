"""What controls the path: one factor of distillation changed at a time, and its stable rank held against OPD's own.

A control may have a single seed. Its number then has no spread of its own, and the spread between the baselines' seeds
stands in for it (``Readouts.spread``): the verdict says no more than that allows, and says that it rests on one seed.
Update norm and Hill tail are described beside the stable rank; no verdict rests on them.
"""

from __future__ import annotations

from collections.abc import Sequence

from geopd.claims.comparisons import Comparison
from geopd.claims.draft import OPD, RLVR, Control, Draft
from geopd.claims.readouts import Readouts
from geopd.results import Results

STRONG, WEAK = ("0.75", "0.5", "0.25"), ("0.05", "0.01")
"""Weights of distillation at which the path stays OPD's, and at which it departs towards RLVR's."""
TOKENS = tuple(
    Control(
        f"{selection.replace('-', '_')}_{share}",
        f"OPD on {words} {share}% of tokens",
        {"token_selection": selection, "rho": f"{share / 100:g}"},
    )
    for selection, words in (("top-gap", "the most over-confident"), ("random", "a random"))
    for share in (25, 50)
)
ROLLOUTS = Control("teacher_rollouts", "OPD on the teacher's responses", {"rollouts": "teacher"})
_NAMES = {"stable_rank_denoised": "stable rank without rounding noise", "stable_rank": "stable rank"}


def token_selection(results: Results) -> list[Comparison]:
    """OPD on a share of each response's tokens keeps OPD's stable rank; the first comparison has all selections."""
    readouts = Readouts(results)
    return [
        _followed(readouts, "summary", "every token selection against OPD on all tokens", TOKENS),
        *(_followed(readouts, control.id, f"{control.label} against all tokens", [control]) for control in TOKENS),
    ]


def teacher_rollouts(results: Results) -> list[Comparison]:
    """OPD on responses that the teacher wrote keeps OPD's stable rank."""
    return [_followed(Readouts(results), ROLLOUTS.id, f"{ROLLOUTS.label} against its own", [ROLLOUTS])]


def mixture(results: Results) -> list[Comparison]:
    """A mixed signal keeps OPD's stable rank until OPD's weight is small, raw (as in the paper) and normalised."""
    readouts = Readouts(results)
    return [_mixed(readouts, normalise=False), _mixed(readouts, normalise=True)]


def _followed(readouts: Readouts, id_: str, label: str, controls: Sequence[Control]) -> Comparison:
    draft = Draft(readouts)
    for control in controls:
        draft.stays(f"{control.label} ends within 15% of OPD", control, OPD, whole=False)
        draft.stays(f"{control.label} is never more than 15% from OPD", control, OPD, whole=True)
    return draft.comparison(id_, label, _quantity(readouts))


def _quantity(readouts: Readouts) -> str:
    return f"{_NAMES[readouts.metric]} at the last common checkpoint, update norm, Hill tail"


def _mixed(readouts: Readouts, *, normalise: bool) -> Comparison:
    draft = Draft(readouts)
    kind = {"normalise": "true"} if normalise else {}
    words = " of signals at unit RMS" if normalise else ""
    # At unit RMS even a pure signal has another size, so the ends are the normalised ones.
    opd = Control("opd", f"OPD{words}", {"alpha": "1", **kind}) if normalise else OPD
    rlvr = Control("rlvr", f"RLVR{words}", {"alpha": "0", **kind}, "rlvr") if normalise else RLVR
    for alpha in STRONG:
        control = Control(f"alpha_{alpha}", f"alpha {alpha}{words}", {"alpha": alpha, **kind}, "mix")
        draft.stays(f"{control.label} ends within 15% of OPD", control, opd, whole=False)
    for alpha in WEAK:
        control = Control(f"alpha_{alpha}", f"alpha {alpha}{words}", {"alpha": alpha, **kind}, "mix")
        draft.departs(f"{control.label} ends more than 15% from OPD, towards RLVR", control, opd, rlvr)
    how = "each at unit RMS first" if normalise else "raw, as in the paper"
    shares = "; signal_share: distillation's share of the mixed signal's RMS (null where training did not log it)"
    quantity = f"{_quantity(readouts)}{shares}"
    return draft.comparison("normalised" if normalise else "raw", f"OPD's and RLVR's signals mixed, {how}", quantity)
