"""geopd: geometry of on-policy distillation. Where post-training moved a language model's weights.

The public API, loaded on first use: ``measure``, ``make_plan``, ``MeasureOptions``, ``read_results``, ``summarise``,
``decide_claims``, ``write_report``, ``run_study``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geopd.claims import decide_claims
    from geopd.engine import MeasureOptions, MeasureOutcome, make_plan, measure
    from geopd.report import write_report
    from geopd.results import Results, read_results
    from geopd.results.summary import summarise
    from geopd.study import run_study

_HOME = {
    "MeasureOptions": "geopd.engine",
    "MeasureOutcome": "geopd.engine",
    "Results": "geopd.results",
    "decide_claims": "geopd.claims",
    "make_plan": "geopd.engine",
    "measure": "geopd.engine",
    "read_results": "geopd.results",
    "run_study": "geopd.study",
    "summarise": "geopd.results.summary",
    "write_report": "geopd.report",
}

__all__ = [
    "MeasureOptions",
    "MeasureOutcome",
    "Results",
    "decide_claims",
    "make_plan",
    "measure",
    "read_results",
    "run_study",
    "summarise",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use (PEP 562), so that ``import geopd`` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'geopd' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
