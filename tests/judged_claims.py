"""One claim, judged."""

from __future__ import annotations

from typing import Any

from geopd.claims import CLAIMS
from geopd.claims.comparisons import described
from geopd.results import Results


def judged(results: Results, id_: str) -> dict[str, dict[str, Any]]:
    """The comparisons of one claim as they stand in claims.json, by their ids."""
    claim = next(claim for claim in CLAIMS if claim.id == id_)
    return {comparison.id: described(comparison) for comparison in claim.compare(results)}
