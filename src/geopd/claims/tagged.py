"""Runs that differ from a baseline in named ways: which baseline, and how accurate a run is at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from geopd.claims.roles import tags_of
from geopd.results import Results

ACCURACY = ("held_out", "avg@4")
"""Benchmark and decoding that projection arms are compared on: all of them have it at their end."""
BEFORE = ("selection", "avg@8")
"""Sampled accuracy that every checkpoint of a baseline has."""
BENCHMARKS = ("held_out", "carries", "subtraction", "no_working", "three_digits", "strings")


@dataclass(frozen=True)
class TaggedRun:
    """A line of ``runs.parquet``; ``last`` is its last step, ``origin`` the digest of what its update counts from."""

    name: str
    paradigm: str
    seed: int
    origin: str
    tags: Mapping[str, str]
    last: int | None

    def number(self, tag: str) -> int:
        """A tag that counts something.

        Raises:
            ValueError: the run lacks the tag, or it is no whole number.
        """
        value = self.tags.get(tag)
        if value is None or not value.isdecimal():
            found = "no tag" if value is None else f"tag {value!r} as"
            raise ValueError(f"run {self.name} has {found} {tag}: write a whole number into its run.json")
        return int(value)


@dataclass(frozen=True)
class Score:
    """Mean over problems, with the standard error over them."""

    value: float
    se: float


def tagged_runs(results: Results) -> list[TaggedRun]:
    """Every run of the folder, by name; one without a seed counts as seed 0."""
    return [
        TaggedRun(
            row["run"],
            row["paradigm"],
            row["seed"] or 0,
            str(row["origin_digest"] or row["origin"]),
            tags_of(row),
            max(row["steps"] or [], default=None),
        )
        for row in results.runs.sort("run").iter_rows(named=True)
    ]


def first_by_seed(runs: Iterable[TaggedRun]) -> dict[int, TaggedRun]:
    """Of runs that play one part, the one of each seed with the shortest name."""
    found: dict[int, TaggedRun] = {}
    for run in sorted(runs, key=lambda run: (run.seed, len(run.name), run.name)):
        found.setdefault(run.seed, run)
    return found


def baseline_of(run: TaggedRun, runs: Iterable[TaggedRun]) -> TaggedRun | None:
    """The run without tags of the same paradigm, seed and origin."""
    kind = run.paradigm, run.seed, run.origin
    return first_by_seed(r for r in runs if not r.tags and (r.paradigm, r.seed, r.origin) == kind).get(run.seed)


def redrawn(*casts: Mapping[int, TaggedRun]) -> bool:
    """Whether there are at least two seeds, and in each cast every seed has an origin of its own."""
    return all(len(cast) > 1 and len({run.origin for run in cast.values()}) == len(cast) for cast in casts)


@dataclass(frozen=True)
class Accuracies:
    """The evaluations of a results folder, looked up by run, step, benchmark and decoding."""

    results: Results

    @cached_property
    def _scores(self) -> dict[tuple[str, int | None, str, str], Score]:
        return {
            (row["run"], row["step"], row["benchmark"], row["decoding"]): Score(row["value"], row["se"] or 0.0)
            for row in self.results.evaluations.iter_rows(named=True)
        }

    def at_end(self, run: TaggedRun, benchmark: str, decoding: str) -> Score | None:
        """A run's score at its last step; None where it was not evaluated so."""
        return self.at(run, run.last, benchmark, decoding)

    def at(self, run: TaggedRun, step: int | None, benchmark: str, decoding: str) -> Score | None:
        """A run's score at one of its steps; None where it was not evaluated so."""
        return self._scores.get((run.name, step, benchmark, decoding))

    def described(self, run: TaggedRun) -> dict[str, float]:
        """Accuracy at the end, by benchmark."""
        found = {name: self.at_end(run, name, ACCURACY[1]) for name in BENCHMARKS}
        return {name: score.value for name, score in found.items() if score is not None}
