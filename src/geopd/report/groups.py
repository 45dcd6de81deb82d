"""Runs that differ in nothing but their seed, taken together: one mean with an interval over seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from geopd.results import PARADIGMS, Results
from geopd.results.statistics import t_interval

_SEED = re.compile(r"[-_ ]?s(?:eed)?[-_ ]?\d+$")
_ONLINE = ("opd", "rlvr", "mix")


@dataclass(frozen=True)
class Group:
    """Runs of equal paradigm, origin kind and tags, one per seed; often a single run.

    ``shared_origin`` says whether it starts where the on-policy runs of its seed start. ``tags`` name everything in
    which its runs differ from their baseline, so a baseline has none.
    """

    name: str
    paradigm: str
    runs: tuple[str, ...]
    tags: dict[str, str] = field(default_factory=dict)
    shared_origin: bool = False

    @property
    def label(self) -> str:
        """The name, with the number of seeds where there are several."""
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} seeds)"


def groups_of(results: Results) -> list[Group]:
    """All groups of a results folder, by paradigm, baselines before tagged runs, short names before long ones.

    Runs form a group where paradigm, tags and origin kind (shared with the on-policy runs of the same seed, or not)
    agree, all seeds are known and differ, and all end at the same step. Anything else stays a run of its own.
    """
    order = {p: i for i, p in enumerate(PARADIGMS)}
    rows = {row["run"]: row for row in results.runs.to_dicts()}
    names = set(rows) | set(results.measurements["run"].unique()) | set(results.evaluations["run"].unique())
    about = {name: _about(rows.get(name, {}), order) for name in names}
    anchors = {(a["seed"], a["origin"]) for a in about.values() if a["paradigm"] in _ONLINE}
    buckets: dict[tuple[Any, ...], list[str]] = {}
    for name in sorted(names):
        mine = about[name]
        mine["shared"] = (mine["seed"], mine["origin"]) in anchors
        key = (mine["paradigm"], mine["shared"], tuple(sorted(mine["tags"].items())), mine["end"])
        buckets.setdefault(key, []).append(name)
    together = [part for runs in buckets.values() for part in _parts(runs, about)]
    groups: list[Group] = []
    for runs in together:
        first = about[runs[0]]
        name = runs[0] if len(runs) == 1 else _shared_name(runs, first, {group.name for group in groups} | names)
        by_seed = tuple(sorted(runs, key=lambda run: (about[run]["seed"] or 0, run)))
        groups.append(Group(name, first["paradigm"], by_seed, first["tags"], first["shared"]))
    return sorted(groups, key=lambda g: (order[g.paradigm], bool(g.tags), len(g.name), g.name))


def _about(row: dict[str, Any], order: dict[str, int]) -> dict[str, Any]:
    return {
        "paradigm": p if (p := row.get("paradigm")) in order else "other",
        "seed": row.get("seed"),
        "origin": row.get("origin_digest") or row.get("origin"),
        "tags": {str(k): str(v) for k, v in json.loads(row.get("tags") or "{}").items()},
        "end": max(row.get("steps") or [], default=None),
    }


def _parts(runs: list[str], about: dict[str, dict[str, Any]]) -> list[list[str]]:
    if _replicates(runs, about):
        return [runs]
    stems: dict[str, list[str]] = {}
    for run in runs:
        stems.setdefault(_SEED.sub("", run), []).append(run)
    return [
        part for some in stems.values() for part in ([some] if _replicates(some, about) else [[run] for run in some])
    ]


def _replicates(runs: list[str], about: dict[str, dict[str, Any]]) -> bool:
    seeds = [about[run]["seed"] for run in runs]
    return None not in seeds and len(set(seeds)) == len(seeds)


def _shared_name(runs: list[str], about: dict[str, Any], taken: set[str]) -> str:
    stems = {_SEED.sub("", run) for run in runs}
    tags = ", ".join(f"{k} {v}" for k, v in sorted(about["tags"].items()))
    name = stems.pop() if len(stems) == 1 else about["paradigm"] + (f" ({tags})" if tags else "")
    if not name or name in taken:
        name = f"{name or about['paradigm']} {'from the shared origin' if about['shared'] else 'over seeds'}"
    return name


def fold(groups: Sequence[Group], lines: pl.DataFrame, by: Sequence[str] = (), value: str = "value") -> pl.DataFrame:
    """Means over the seeds of each group, at the steps that all its runs in ``lines`` have.

    Args:
        groups: the groups to keep; runs outside them are left out.
        lines: one line per ``run``, ``step`` and ``by``; without nulls in ``value``.
        by: further columns that tell lines apart.
        value: the column whose interval is wanted; every other number is averaged too.

    Returns:
        The columns of ``lines`` with ``run`` holding the group's name, and ``seeds``, ``each`` (the seeds' values) and
        ``half``, the half-width of the 95% t interval (null with one seed).
    """
    members = [(run, group.name, i) for group in groups for i, run in enumerate(group.runs)]
    table = pl.DataFrame(members, schema={"run": pl.String, "group": pl.String, "rank": pl.Int64}, orient="row")
    joined = lines.join(table, on="run").sort("group", "rank")
    extra = [c for c in lines.columns if c not in {"run", "step", value, *by}]
    numbers = [c for c in extra if lines.schema[c].is_numeric()]
    known = pl.col("run").n_unique().over("group", *by).alias("runs")
    folded = (
        joined.with_columns(known)
        .group_by("group", "step", *by, maintain_order=True)
        .agg(
            pl.col(value).mean(),
            pl.col(value).alias("each"),
            pl.len().cast(pl.Int64).alias("seeds"),
            pl.col("runs").first(),
            *(pl.col(c).mean() for c in numbers),
            *(pl.col(c).first() for c in extra if c not in numbers),
        )
        .filter(pl.col("seeds") == pl.col("runs"))
        .drop("runs")
        .rename({"group": "run"})
    )
    halves = [half_width(each) for each in folded["each"].to_list()]
    return folded.with_columns(pl.Series("half", halves, dtype=pl.Float64)).sort("run", "step", *by)


def half_width(values: Sequence[float]) -> float | None:
    """Half the 95% t interval of a mean over seeds; none for a single seed."""
    if len(values) < 2:
        return None
    interval = t_interval(values)
    return interval.high - interval.estimate
