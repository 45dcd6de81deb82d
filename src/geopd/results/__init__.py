"""The tables of a results folder, the store that writes them and what is derived from them. No torch."""

from geopd.results.metrics import METRICS, Metric
from geopd.results.reading import Results, read_results
from geopd.results.schema import (
    EVALUATIONS,
    KEY,
    MEASUREMENTS,
    NULLS,
    PARADIGMS,
    RUNS,
    Identity,
    Measurement,
    Null,
    Status,
    parameters_of,
    row,
    setting,
)
from geopd.results.store import Part, Store, digest_of, write_atomically, write_json

__all__ = [
    "EVALUATIONS",
    "KEY",
    "MEASUREMENTS",
    "METRICS",
    "NULLS",
    "PARADIGMS",
    "RUNS",
    "Identity",
    "Measurement",
    "Metric",
    "Null",
    "Part",
    "Results",
    "Status",
    "Store",
    "digest_of",
    "parameters_of",
    "read_results",
    "row",
    "setting",
    "write_atomically",
    "write_json",
]
