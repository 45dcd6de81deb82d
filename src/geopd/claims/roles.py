"""Which run plays which part: SFT, OPD and RLVR of each seed, with SFT from the base or from the common anchor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from geopd.results import Results

ROLES = ("sft", "opd", "rlvr")
ONLINE = ("opd", "rlvr")


@dataclass(frozen=True)
class Cast:
    """One comparison: for each seed the run of each role, and what was left out.

    ``origins`` holds the digest of the online runs' origin by seed: seeds that share one are no replicates.
    ``tagged`` names the runs with tags that play a part because no run without tags does.
    """

    id: str
    label: str
    seeds: dict[int, dict[str, str]]
    origins: dict[int, str]
    left_out: list[str]
    tagged: tuple[str, ...] = ()

    def runs(self, role: str) -> list[str]:
        """The runs of a role, by seed."""
        return [cast[role] for _, cast in sorted(self.seeds.items()) if role in cast]

    @property
    def everyone(self) -> list[str]:
        """All runs of the comparison."""
        return [run for role in ROLES for run in self.runs(role)]

    @property
    def missing(self) -> list[str]:
        """Roles that no seed fills."""
        return [role for role in ROLES if not self.runs(role)]

    def of(self, roles: Sequence[str]) -> Cast:
        """The same comparison with these roles alone."""
        kept = {seed: {role: run for role, run in runs.items() if role in roles} for seed, runs in self.seeds.items()}
        label = self.label if "sft" in roles else f"{' and '.join(role.upper() for role in roles)} from one origin"
        return replace(self, label=label, seeds={seed: runs for seed, runs in kept.items() if runs})

    @property
    def redrawn(self) -> bool:
        """Whether there are at least two seeds and each drew its own origin."""
        return _distinct(self.origins)


LABELS = {
    "paper": "SFT from the base, OPD and RLVR from the anchor (the paper's own comparison)",
    "same_origin": "all three from the same origin",
}


def tags_of(row: dict[str, Any]) -> dict[str, str]:
    """The tags of a line of ``runs.parquet``: everything in which the run differs from its baseline."""
    return {str(k): str(v) for k, v in json.loads(row["tags"] or "{}").items()}


def origins_redrawn(results: Results, runs: Iterable[str]) -> bool:
    """Whether these runs have at least two seeds and each seed an origin of its own."""
    wanted = set(runs)
    rows = [row for row in results.runs.iter_rows(named=True) if row["run"] in wanted]
    return _distinct({row["seed"] or 0: _origin(row) for row in rows})


def _distinct(origins: dict[int, str]) -> bool:
    return len(origins) > 1 and len(set(origins.values())) == len(origins)


def _ranked(names: list[str], paradigm: str) -> list[str]:
    # `opd-s0` is as good as `opd`; `sft_continued` is not `sft`.
    return sorted(names, key=lambda name: (name.split("-")[0] != paradigm, len(name), name))


def casts(results: Results) -> list[Cast]:
    """Both comparisons; roles that nothing fills stay empty.

    Runs with equal paradigm, origin and seed compete for a role: an untagged run wins, then the one named like its
    paradigm, then the shortest name. The losers are listed in ``left_out``, and online runs of another origin. A tagged
    run never fills a role of which any seed has an untagged run; it is no baseline, and not listed either.
    """
    rows = [row | {"tags": tags_of(row)} for row in results.runs.sort("run").to_dicts()]
    measured = set(results.measurements["run"])
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["paradigm"] in ROLES and row["run"] in measured:
            by_seed.setdefault(row["seed"] or 0, []).append(row)
    return [_cast(id_, by_seed) for id_ in LABELS]


def missing_roles(results: Results, cast: Cast, roles: Sequence[str] = ROLES) -> str | None:
    """Why a comparison lacks roles that it needs, or None where each has a run."""
    missing = [role for role in cast.missing if role in roles]
    if not missing:
        return None
    paradigms = {str(p) for p in results.runs["paradigm"]}
    if missing == ["sft"] and "sft" in paradigms:
        return f"no SFT run from {'the same origin' if cast.id == 'same_origin' else 'another origin (the base)'}"
    here = ", ".join(sorted(paradigms)) or "none"
    wanted = ", ".join(role.upper() for role in missing)
    return f"no measured run for {wanted}; the folder's paradigms: {here} (`--paradigm label=...` names one)"


def _cast(id_: str, by_seed: dict[int, list[dict[str, Any]]]) -> Cast:
    seeds: dict[int, dict[str, str]] = {seed: {} for seed in sorted(by_seed)}
    origins = {seed: anchor for seed, rows in sorted(by_seed.items()) if (anchor := _anchor(rows)) is not None}
    left_out: list[str] = []
    tagged: list[str] = []
    for role in ROLES:
        fitting = {seed: _candidates(id_, role, rows, origins.get(seed)) for seed, rows in by_seed.items()}
        untagged = any(not row["tags"] for rows in fitting.values() for row in rows)
        for seed, rows in by_seed.items():
            able = [row["run"] for row in fitting[seed] if not (untagged and row["tags"])]
            chosen = _ranked(able, role)[:1]
            elsewhere = [row["run"] for row in rows if row["paradigm"] == role and not row["tags"] and role in ONLINE]
            left_out += [name for name in {*able, *elsewhere} if name not in chosen]
            if chosen:
                seeds[seed][role] = chosen[0]
                tagged += [] if untagged else chosen
    kept = {seed: cast for seed, cast in seeds.items() if cast}
    label = LABELS[id_] + (f"; for want of runs without tags: {', '.join(tagged)}" if tagged else "")
    return Cast(id_, label, kept, origins, sorted(set(left_out)), tuple(tagged))


def _candidates(id_: str, role: str, rows: list[dict[str, Any]], anchor: str | None) -> list[dict[str, Any]]:
    fitting = [row for row in rows if row["paradigm"] == role]
    if role in ONLINE:
        return [row for row in fitting if _origin(row) == anchor]
    if anchor is None:
        return fitting
    return [row for row in fitting if (_origin(row) == anchor) == (id_ == "same_origin")]


def _anchor(rows: list[dict[str, Any]]) -> str | None:
    """Origin of the online runs: the one most of them share, those without tags first."""
    online = [row for row in rows if row["paradigm"] in ONLINE]
    origins = [_origin(row) for row in online if not row["tags"]] or [_origin(row) for row in online]
    return max(sorted(set(origins)), key=origins.count) if origins else None


def _origin(row: dict[str, Any]) -> str:
    return str(row["origin_digest"] or row["origin"])
