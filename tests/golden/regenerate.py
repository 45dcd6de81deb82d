"""The golden table: every measurement of a tiny seeded pair. ``python tests/golden/regenerate.py`` writes it anew.

Do so only for a change that is meant to change values, and look at the difference before committing it: a refactor
leaves the file as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from geopd.diagnostics import (
    CATALOGUE,
    PAIR_CATALOGUE,
    Comparison,
    OriginMatrix,
    Parameters,
    Place,
    Rank,
    RunPair,
    Trajectory,
    UpdateSubspace,
)
from geopd.diagnostics.coordinates import visible_signs
from geopd.diagnostics.trajectory import increment_of
from geopd.results import Measurement, Null
from geopd.spectral import decompose

FILE = Path(__file__).parent / "tiny_pair.json"
ROWS, COLS = 16, 12
PARAMETERS = Parameters(Rank("p/4"), Rank("p/4"), (0.5, 0.3), 1e-3, (2,), (4,))


def weights(seed: int) -> torch.Tensor:
    """Seeded integers over a power of two: the same bits on every machine, whatever its random floats do."""
    state, found = seed, []
    for _ in range(ROWS * COLS):
        state = (1103515245 * state + 12345) % (1 << 31)
        found.append(((state >> 16) % 2001 - 1000) / (1 << 15))
    return torch.tensor(found, dtype=torch.float32).reshape(ROWS, COLS)


def rows() -> list[dict[str, Any]]:
    """Measurements and closed-form nulls of two checkpoints, and of the two as two runs, in float32 and in bf16."""
    start, first, last = weights(1), weights(1) + weights(3) / 64, weights(1) + weights(2) / 16
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        before, middle, end = (W.to(dtype) for W in (start, first, last))
        origin = OriginMatrix(before, PARAMETERS)
        subspace = UpdateSubspace(decompose(end.double() - before.double(), 2))
        path = Trajectory([increment_of(origin, None, middle), increment_of(origin, middle, end)], seed=0)
        signs = []
        for step, after in ((1, middle), (2, end)):
            comparison = Comparison(OriginMatrix(before, PARAMETERS), after, subspace, Place(path, step - 1))
            for diagnostic in CATALOGUE:
                found += _rows(str(dtype), step, diagnostic.measure(comparison), diagnostic.nulls(comparison))
            signs.append(visible_signs(comparison))
        runs = RunPair(origin, *signs)
        for two in PAIR_CATALOGUE:
            found += _rows(str(dtype), 2, two.measure(runs), two.nulls(runs))
    return found


def _rows(dtype: str, step: int, measured: list[Measurement], nulls: list[Null]) -> list[dict[str, Any]]:
    values = [
        {
            "dtype": dtype,
            "step": step,
            "metric": m.metric,
            "setting": m.setting,
            "value": m.value,
            "error": m.error,
            "status": str(m.status),
            "note": m.note,
            "exact": m.method == "exact count",
        }
        for m in measured
    ]
    return values + [
        {
            "dtype": dtype,
            "step": step,
            "metric": n.metric,
            "setting": n.setting,
            "null": n.null,
            "value": n.mean,
            "sd": n.sd,
        }
        for n in nulls
        if n.draws == 0  # what is drawn depends on the machine's random floats
    ]


if __name__ == "__main__":
    FILE.write_text(json.dumps(rows(), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {FILE}\n")
