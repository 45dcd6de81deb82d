"""geopd: geometry of on-policy distillation. Where post-training moved a language model's weights.

The public API, loaded on first use: ``measure``, ``make_plan``, ``MeasureOptions``, ``DecompositionCache``, ``Shard``,
``merge``, ``read_results``, ``summarise``, ``decide_claims``, ``write_report``, ``run_study``; for training
``parse_config``, ``train``, ``GeometryMonitor``, ``basis_of_run``, ``Projection``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geopd.claims import decide_claims
    from geopd.engine import (
        DecompositionCache,
        MeasureOptions,
        MeasureOutcome,
        MergeOutcome,
        Shard,
        make_plan,
        measure,
        merge,
    )
    from geopd.report import write_report
    from geopd.results import Results, read_results
    from geopd.results.summary import summarise
    from geopd.study import run_study
    from geopd.training import GeometryMonitor, Projection, basis_of_run, parse_config, train

_HOME = {
    "DecompositionCache": "geopd.engine",
    "GeometryMonitor": "geopd.training",
    "MeasureOptions": "geopd.engine",
    "MeasureOutcome": "geopd.engine",
    "MergeOutcome": "geopd.engine",
    "Projection": "geopd.training",
    "Results": "geopd.results",
    "Shard": "geopd.engine",
    "basis_of_run": "geopd.training",
    "decide_claims": "geopd.claims",
    "make_plan": "geopd.engine",
    "measure": "geopd.engine",
    "merge": "geopd.engine",
    "parse_config": "geopd.training",
    "read_results": "geopd.results",
    "run_study": "geopd.study",
    "summarise": "geopd.results.summary",
    "train": "geopd.training",
    "write_report": "geopd.report",
}

__all__ = [
    "DecompositionCache",
    "GeometryMonitor",
    "MeasureOptions",
    "MeasureOutcome",
    "MergeOutcome",
    "Projection",
    "Results",
    "Shard",
    "basis_of_run",
    "decide_claims",
    "make_plan",
    "measure",
    "merge",
    "parse_config",
    "read_results",
    "run_study",
    "summarise",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use (PEP 562), so that ``import geopd`` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'geopd' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
