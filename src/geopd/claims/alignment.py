"""How early a run's update lies in its final subspace, and how alike its successive increments are."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from geopd.claims.comparisons import Comparison
from geopd.claims.endpoints import NAMES, by_seed
from geopd.claims.roles import Cast
from geopd.claims.trajectories import Lines, Path, null_paths, over_paths, paths
from geopd.claims.verdicts import Statement
from geopd.results import Results

HIGH_SIMILARITY = 0.5
"""What "high from the first checkpoint" is taken to mean: more than half of the final subspace is there."""


def early_alignment(results: Results) -> list[Comparison]:
    """OPD's first checkpoint is nearer its final subspace than SFT and RLVR are; its increments are more alike.

    Both are compared at the later of the first checkpoints, by training progress and, for the similarity to the end,
    by the share of the final update norm that is reached as well. ``beyond_null`` is about the differences less those
    of random walks with the runs' own increments. The headline K speaks; every other K that was measured follows.
    """
    found = [*_to_the_end(results), *_between_increments(results)]
    for k in _other_sizes(results):
        found += [*_to_the_end(results, k), *_between_increments(results, k)]
    return found


def _other_sizes(results: Results) -> list[int]:
    rows = results.measurements.filter((pl.col("metric") == "subspace_similarity") & ~pl.col("is_default"))
    sizes = rows["setting"].unique().str.extract(r"(?:^|;)k=(\d+)(?:;|$)").drop_nulls().cast(pl.Int64)
    return sorted(set(sizes.to_list()))


def _at(k: int | None) -> tuple[dict[str, Any], str, str]:
    """What picks a K other than the headline one, and how its comparisons are marked."""
    return ({}, "", "") if k is None else ({"k": k, "view": "native"}, f"_k{k}", f", K = {k}")


def _to_the_end(results: Results, k: int | None = None) -> list[Comparison]:
    size, suffix, note = _at(k)
    found = paths(results, "subspace_similarity", **size)
    null, nulls = null_paths(results, "subspace_similarity", ("random_walk", "gaussian"), **size)
    lines, norms = Lines("similarity to the final subspace", found, null, nulls), paths(results, "update_norm")

    def look(cast: Cast) -> tuple[Lines, list[Statement]]:
        opd, null_opd = (by_seed(cast, "opd", _over_half(known)) for known in (found, nulls))
        half = Statement("OPD's first checkpoint has more than half of its final subspace", opd, null_opd)
        orders = [*_above(cast, "progress", found, nulls, None), *_above(cast, "norm", found, nulls, norms)]
        return lines, [half, *orders]

    return over_paths(results, look, suffix=suffix, note=note, null_at=lambda path: path[0][1])


def _over_half(found: dict[str, Path]) -> dict[str, float]:
    return {run: path[0][1] - HIGH_SIMILARITY for run, path in found.items() if len(path) > 1}


def _between_increments(results: Results, k: int | None = None) -> list[Comparison]:
    size, suffix, note = _at(k)
    lines = Lines(
        "similarity of successive increments",
        paths(results, "increment_similarity", **size),
        *null_paths(results, "increment_similarity", ("random_walk", "gaussian"), **size),
    )

    def look(cast: Cast) -> tuple[Lines, list[Statement]]:
        return lines, _above(cast, "progress", lines.found, lines.nulls, None)

    return over_paths(results, look, suffix=f"_increments{suffix}", note=f", on successive increments{note}")


def _above(
    cast: Cast, clock: str, found: dict[str, Path], nulls: dict[str, Path], norms: dict[str, Path] | None
) -> list[Statement]:
    """OPD above SFT and above RLVR where both have started, as differences of similarities."""
    statements = []
    for role in ("sft", "rlvr"):
        there, here = _at_common_start(cast, role, found, norms)
        null_there, null_here = _at_common_start(cast, role, nulls, norms)
        statements.append(
            Statement(
                f"OPD above {NAMES[role]} at equal {clock}",
                {seed: here[seed] - there[seed] for seed in here},
                {seed: null_here[seed] - null_there[seed] for seed in null_here},
                contrast=True,
            )
        )
    return statements


def _at_common_start(
    cast: Cast, role: str, found: dict[str, Path], norms: dict[str, Path] | None
) -> tuple[dict[int, float], dict[int, float]]:
    """Similarity of ``role`` and of OPD where both have started, by seed, on a clock of progress or of norm."""
    there: dict[int, float] = {}
    here: dict[int, float] = {}
    for seed, runs in cast.seeds.items():
        if "opd" not in runs or role not in runs:
            continue
        own, other = (_clocked(found.get(runs[r], []), norms, runs[r]) for r in ("opd", role))
        if len(own) < 2 or len(other) < 2:
            continue
        start = max(min(x for x, _ in own), min(x for x, _ in other))
        there[seed], here[seed] = (float(np.interp(start, *np.array(sorted(path)).T)) for path in (other, own))
    return there, here


def _clocked(path: Path, norms: dict[str, Path] | None, run: str) -> Path:
    if norms is None:
        return path
    sizes = dict(norms.get(run, []))
    end = norms[run][-1][1] if sizes else 0.0
    return [(sizes[progress] / end, value) for progress, value in path if progress in sizes and end > 0]
