"""A run that gained checkpoints: what the older part says of the first ones is kept.

A part's name tells its inputs, settings and steps, so the part of a run's first steps is known by name alone; nothing
has to be remembered. Only what depends on the run's end is measured anew for the old steps (``task.TO_THE_END``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from geopd.engine.task import TO_THE_END
from geopd.engine.workload import Kept
from geopd.results import MEASUREMENTS, NULLS, Part, Store
from geopd.results.store import PARTS, VECTORS


def older_part(store: Store, steps: int, key_of: Callable[[int], str]) -> Kept | None:
    """The part of the most of a run's first steps that is there whole; ``key_of`` names the part of the first i."""
    for i in range(steps - 1, 0, -1):
        key = key_of(i)
        if store.has(key):
            record = store.record(key)
            if not record["failure"] and not record["retry"]:
                return Kept(key, i)
    return None


def extended(store: Store, kept: Kept, part: Part) -> Part:
    """``part``, of what is new, with what the older part says of its steps; rows of a part that failed stay alone."""
    if not part.record["kept_steps"]:
        return part
    rows = pl.read_parquet(store.root / PARTS / f"{kept.key}.parquet").filter(~pl.col("metric").is_in(TO_THE_END))
    is_null = pl.col("null").is_not_null()
    measurements = rows.filter(~is_null).select(MEASUREMENTS.names()).to_dicts()
    nulls = rows.filter(is_null).select(NULLS.names()).to_dicts()
    vectors = dict(part.vectors)
    older = store.root / VECTORS / f"{kept.key}.npz"
    if older.exists():
        with np.load(older, allow_pickle=False) as arrays:
            vectors |= {name: arrays[name] for name in arrays.files}
    vectors = dict(sorted(vectors.items()))
    return Part(part.key, [*part.measurements, *measurements], [*part.nulls, *nulls], vectors, part.record)
