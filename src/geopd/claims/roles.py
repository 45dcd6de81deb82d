"""Which run plays which part: SFT, OPD and RLVR of each seed, with SFT from the base or from the common anchor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from geopd.results import Results

ROLES = ("sft", "opd", "rlvr")
ONLINE = ("opd", "rlvr")


@dataclass(frozen=True)
class Cast:
    """One comparison: for each seed the run of each role, and what was left out.

    ``origins`` holds the digest of the online runs' origin by seed: seeds that share one are no replicates.
    """

    id: str
    label: str
    seeds: dict[int, dict[str, str]]
    origins: dict[int, str]
    left_out: list[str]

    def runs(self, role: str) -> list[str]:
        """The runs of a role, by seed."""
        return [cast[role] for _, cast in sorted(self.seeds.items()) if role in cast]

    @property
    def missing(self) -> list[str]:
        """Roles that no seed fills."""
        return [role for role in ROLES if not self.runs(role)]

    @property
    def redrawn(self) -> bool:
        """Whether there are at least two seeds and each drew its own origin."""
        return len(self.origins) > 1 and len(set(self.origins.values())) == len(self.origins)


LABELS = {
    "paper": "SFT from the base, OPD and RLVR from the anchor (the paper's own comparison)",
    "same_origin": "all three from the same origin",
}


def casts(results: Results) -> list[Cast]:
    """Both comparisons; roles that nothing fills stay empty.

    Runs with equal paradigm, origin and seed compete for a role: an untagged run wins, then the one named like its
    paradigm, then the shortest name. The losers are listed in ``left_out``.
    """
    rows = results.runs.sort("run").to_dicts()
    measured = set(results.measurements["run"])
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["paradigm"] in ROLES and row["run"] in measured:
            by_seed.setdefault(row["seed"] or 0, []).append(row)
    return [_cast(id_, by_seed) for id_ in LABELS]


def _cast(id_: str, by_seed: dict[int, list[dict[str, Any]]]) -> Cast:
    seeds: dict[int, dict[str, str]] = {}
    origins: dict[int, str] = {}
    left_out: list[str] = []
    for seed, rows in sorted(by_seed.items()):
        anchor = _anchor(rows)
        seeds[seed] = {}
        if anchor is not None:
            origins[seed] = anchor
        for role in ROLES:
            candidates = [row for row in rows if row["paradigm"] == role]
            if role == "sft" and anchor is not None:
                same = id_ == "same_origin"
                candidates = [row for row in candidates if (_origin(row) == anchor) == same]
            elif role in ONLINE:
                left_out += [row["run"] for row in candidates if _origin(row) != anchor]
                candidates = [row for row in candidates if _origin(row) == anchor]
            ranked = sorted(candidates, key=lambda row: (bool(row["tags"]), row["run"] != role, len(row["run"])))
            if ranked:
                seeds[seed][role] = ranked[0]["run"]
                left_out += [row["run"] for row in ranked[1:]]
    return Cast(id_, LABELS[id_], seeds, origins, sorted(left_out))


def _anchor(rows: list[dict[str, Any]]) -> str | None:
    """Origin of the online runs: the one most of them share."""
    origins = [_origin(row) for row in rows if row["paradigm"] in ONLINE]
    return max(sorted(set(origins)), key=origins.count) if origins else None


def _origin(row: dict[str, Any]) -> str:
    return str(row["origin_digest"] or row["origin"])
