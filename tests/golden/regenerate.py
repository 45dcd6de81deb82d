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

from geopd.diagnostics import CATALOGUE, Comparison, OriginMatrix, Parameters, Rank, UpdateSubspace
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
    """Measurements and closed-form nulls of two checkpoints, stored in float32 and in bf16."""
    origin, last = weights(1), weights(1) + weights(2) / 16
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        before, end = origin.to(dtype), last.to(dtype)
        subspace = UpdateSubspace(decompose(end.double() - before.double(), 2))
        for step, after in ((1, origin + weights(3) / 64), (2, last)):
            comparison = Comparison(OriginMatrix(before, PARAMETERS), after.to(dtype), subspace)
            for diagnostic in CATALOGUE:
                found += [
                    {
                        "dtype": str(dtype),
                        "step": step,
                        "metric": m.metric,
                        "setting": m.setting,
                        "value": m.value,
                        "error": m.error,
                        "status": str(m.status),
                        "note": m.note,
                        "exact": m.method == "exact count",
                    }
                    for m in diagnostic.measure(comparison)
                ]
                found += [
                    {
                        "dtype": str(dtype),
                        "step": step,
                        "metric": n.metric,
                        "setting": n.setting,
                        "null": n.null,
                        "value": n.mean,
                        "sd": n.sd,
                    }
                    for n in diagnostic.nulls(comparison)
                    if n.draws == 0  # what is drawn depends on the machine's random floats
                ]
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(rows(), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {FILE}\n")
