"""The arms of the projection experiment: their runs, their accuracy at the end, and what training without one gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from statistics import fmean

from geopd.claims.endpoints import NAMES
from geopd.claims.roles import ONLINE
from geopd.claims.tagged import ACCURACY, BEFORE, Accuracies, Score, TaggedRun, baseline_of, first_by_seed, tagged_runs
from geopd.results import Results

_TAGS = {"projection", "k", "mode", "lr_scale", "start"}
CONTINUED = "sft_continued"
"""SFT arms of a run that has the origin of OPD and RLVR; those of SFT from its own origin are plain ``sft``."""
TITLES = NAMES | {CONTINUED: "SFT from OPD's origin"}


@dataclass(frozen=True, order=True)
class Width:
    """How an arm is confined: to ``k`` dimensions of every matrix, how, and with which learning rate."""

    k: int
    mode: str = "gradient"
    lr_scale: str = "none"

    @property
    def suffix(self) -> str:
        """For ids: ``k16``, ``k16_adapter``, ``k16_adapter_sqrt``."""
        parts = [f"k{self.k}"] + [self.mode] * (self.mode != "gradient") + [self.lr_scale] * (self.lr_scale != "none")
        return "_".join(parts)

    @property
    def words(self) -> str:
        """For labels."""
        how = {"gradient": "projected gradients", "adapter": "exact, in an adapter"}.get(self.mode, self.mode)
        return f"K = {self.k}, {how}" + (", learning rate scaled by sqrt(n/K)" if self.lr_scale == "sqrt" else "")


Arm = dict[int, TaggedRun]
Key = tuple[str, str, Width | None]


@dataclass(frozen=True)
class Term:
    """An arm's accuracy in a statement, with the sign it enters with; ``width`` is None for the free arm."""

    sign: int
    paradigm: str
    basis: str
    width: Width | None = None

    @property
    def key(self) -> Key:
        """Which arm it is."""
        return self.paradigm, self.basis, self.width

    @property
    def role(self) -> str:
        """What the arm is called in ``runs``: ``OPD V_16``, ``SFT free``, ``OPD random 4``."""
        what = {"none": "free", "update": f"V_{self.k}"}.get(self.basis, f"{self.basis} {self.k}")
        return f"{TITLES[self.paradigm]} {what}"

    @property
    def wanted(self) -> str:
        """How a run that fills the role is marked."""
        tags = {"projection": self.basis}
        if self.width is not None:
            tags |= {"k": str(self.width.k), "mode": self.width.mode}
            tags |= {"lr_scale": self.width.lr_scale} if self.width.lr_scale != "none" else {}
        paradigm = "sft" if self.paradigm == CONTINUED else self.paradigm
        return f"{self.role} (paradigm {paradigm}, tags {', '.join(f'{k}={v}' for k, v in tags.items())})"

    @property
    def k(self) -> int | None:
        """The dimension, None for the free arm."""
        return self.width.k if self.width is not None else None


@dataclass(frozen=True)
class Arms:
    """The arms of a results folder by paradigm, basis and width, with their accuracies at the end."""

    results: Results

    @cached_property
    def runs(self) -> list[TaggedRun]:
        """Every run of the folder."""
        return tagged_runs(self.results)

    @cached_property
    def scores(self) -> Accuracies:
        """Every evaluation of the folder."""
        return Accuracies(self.results)

    @cached_property
    def groups(self) -> dict[Key, list[TaggedRun]]:
        """Every run of an arm, by paradigm, basis and width; the free arm has no width."""
        found: dict[Key, list[TaggedRun]] = {}
        for run in self.runs:
            basis = run.tags.get("projection")
            if basis is None or not set(run.tags) <= _TAGS:
                continue
            width = None if basis == "none" else _width(run)
            paradigm = CONTINUED if run.paradigm == "sft" and (run.seed, run.origin) in self._anchors else run.paradigm
            found.setdefault((paradigm, basis, width), []).append(run)
        return found

    @cached_property
    def _anchors(self) -> set[tuple[int, str]]:
        return {(run.seed, run.origin) for run in self.runs if run.paradigm in ONLINE}

    def arm(self, term: Term) -> Arm:
        """The runs of an arm by seed, if they have the free arm's start, length and origin where there is one."""
        free = first_by_seed(self.groups.get((term.paradigm, "none", None), []))
        able = [r for r in self.groups.get(term.key, []) if r.seed not in free or _course(r) == _course(free[r.seed])]
        return first_by_seed(able)

    def everyone(self, terms: Sequence[Term]) -> set[str]:
        """The names of all runs that are marked as one of these arms."""
        return {run.name for term in terms for run in self.groups.get(term.key, [])}

    def scored(self, term: Term) -> dict[int, Score]:
        """Accuracy at the end by seed, where it was evaluated."""
        found = {seed: self.scores.at_end(run, *ACCURACY) for seed, run in self.arm(term).items()}
        return {seed: score for seed, score in found.items() if score is not None}

    def total(self, terms: Sequence[Term]) -> dict[int, Score]:
        """The signed sum of the terms' accuracies for every seed that has them all; their errors add as squares."""
        parts = [self.scored(term) for term in terms]
        seeds = sorted(set.intersection(*(set(part) for part in parts)))
        return {
            seed: Score(
                sum(term.sign * part[seed].value for term, part in zip(terms, parts, strict=True)),
                sqrt(sum(part[seed].se ** 2 for part in parts)),
            )
            for seed in seeds
        }

    def widths(self, basis: str, paradigm: str) -> set[Width]:
        """The widths of this basis that a paradigm has an arm of."""
        return {width for p, b, width in self.groups if (p, b) == (paradigm, basis) and width is not None}


def _width(run: TaggedRun) -> Width:
    return Width(run.number("k"), run.tags.get("mode", "gradient"), run.tags.get("lr_scale", "none"))


def _course(run: TaggedRun) -> tuple[str | None, int | None, str]:
    return run.tags.get("start"), run.last, run.origin


def gain(arms: Arms, terms: Sequence[Term], seeds: set[int]) -> tuple[str | None, str | None]:
    """Whether training without projection improves accuracy enough for a projection to lose any of it.

    The gain is the mean over seeds of the free arm's accuracy at its end minus the baseline's where the arm starts, and
    must reach twice the mean standard error of one such difference: all seeds answer the same problems, so averaging
    over seeds does not make that error much smaller. Both are sampled at temperature 1; the start's is known on the
    selection split only, so the two answer different problems and their errors add.

    Returns:
        ``(undefined, unknown)``: why the terms cannot be compared, and why the gain cannot be checked; None where not.
    """
    unknown = None
    for paradigm in dict.fromkeys(term.paradigm for term in terms):
        free = arms.arm(Term(1, paradigm, "none"))
        gains = [_gain_of(arms, free.get(seed), paradigm) for seed in sorted(seeds)]
        unknown = unknown or next((found for found in gains if isinstance(found, str)), None)
        known = [found for found in gains if isinstance(found, Score)]
        if not known or len(known) < len(gains):
            continue
        mean, error = fmean(found.value for found in known), fmean(found.se for found in known)
        if mean < 2 * error:
            return (
                f"undefined, since without projection {TITLES[paradigm]} gains {100 * mean:.1f} points from where the "
                f"arms start, under 2 standard errors of {100 * error:.1f}",
                None,
            )
    return None, unknown


def _gain_of(arms: Arms, free: TaggedRun | None, paradigm: str) -> Score | str:
    if free is None:
        return f"{TITLES[paradigm]} has no arm without projection, so its gain cannot be checked"
    opening = f"the gain of {free.name} over its start cannot be checked"
    baseline, start = baseline_of(free, arms.runs), free.number("start")
    if baseline is None:
        return f"{opening}: its baseline is not in the folder"
    before, after = arms.scores.at(baseline, start, *BEFORE), arms.scores.at_end(free, *ACCURACY)
    if before is None or after is None:
        where = f"{' '.join(BEFORE)} of {baseline.name} at step {start}"
        return f"{opening}: no {where if before is None else ' '.join(ACCURACY)}"
    return Score(after.value - before.value, sqrt(before.se**2 + after.se**2))


def missing(arms: Arms, terms: Sequence[Term]) -> str:
    """Which run or evaluation keeps every seed from having all the terms."""
    for term in terms:
        arm = arms.arm(term)
        if term.key not in arms.groups:
            return f"no run for {term.wanted}"
        if not arm:
            return f"{term.role} and {TITLES[term.paradigm]} free differ in start, length or origin"
        if not arms.scored(term):
            names = ", ".join(run.name for run in arm.values())
            return f"no {' '.join(ACCURACY)} at the end of {names}"
    return f"no seed has all of {', '.join(term.role for term in terms)}"
