"""The tables of a results folder: columns, types and statuses. Other tools read these files, so this is a contract.

A measurement is one row per (run, step, other_run, matrix, metric, setting). Every value carries its status, its
certified numerical error in the value's own unit, the method that made it and, where it is missing, the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from math import isfinite
from typing import Any

import polars as pl


class Status(StrEnum):
    """What a measurement's value is worth."""

    OK = "ok"
    UNDEFINED = "undefined"
    """The metric has no value for this input (null, with the reason in ``note``)."""
    UNRESOLVED = "unresolved"
    """The value is kept but its error is too large to rely on: aggregates leave it out and say how many."""
    FAILED = "failed"
    """The value could not be computed (null, with the reason in ``note``)."""


KEY = ("run", "step", "other_run", "matrix", "metric", "setting")

_IDENTITY: dict[str, Any] = {
    "run": pl.String,
    "step": pl.Int64,
    "other_run": pl.String,
    "matrix": pl.String,
    "layer": pl.Int32,
    "module": pl.String,
    "rows": pl.Int64,
    "cols": pl.Int64,
    "metric": pl.String,
    "setting": pl.String,
    "is_default": pl.Boolean,
}

MEASUREMENTS = pl.Schema(
    {
        **_IDENTITY,
        "value": pl.Float64,
        "error": pl.Float64,
        "status": pl.String,
        "method": pl.String,
        "note": pl.String,
    }
)

NULLS = pl.Schema(
    {**_IDENTITY, "null": pl.String, "mean": pl.Float64, "sd": pl.Float64, "draws": pl.Int64, "method": pl.String}
)

_RUNS: dict[str, Any] = {
    "run": pl.String,
    "paradigm": pl.String,
    "seed": pl.Int64,
    "origin": pl.String,
    "origin_digest": pl.String,
    "path": pl.String,
    "steps": pl.List(pl.Int64),
    "digests": pl.List(pl.String),
    "tags": pl.String,
}
RUNS = pl.Schema(_RUNS)

EVALUATIONS = pl.Schema(
    {
        "run": pl.String,
        "step": pl.Int64,
        "benchmark": pl.String,
        "decoding": pl.String,
        "n": pl.Int64,
        "value": pl.Float64,
        "se": pl.Float64,
    }
)

PARADIGMS = ("sft", "opd", "rlvr", "mix", "other")


@dataclass(frozen=True, slots=True)
class Identity:
    """Which matrix of which checkpoint a row speaks of."""

    run: str
    step: int | None
    matrix: str
    layer: int | None
    module: str
    rows: int
    cols: int
    other_run: str | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One value of one metric, before it is tied to a matrix and a checkpoint.

    Raises:
        ValueError: if value and status disagree: a missing value needs a status other than ``ok`` and a note, and a
            value must be finite (undefined is null, never NaN or 0).
    """

    metric: str
    setting: str
    value: float | None
    error: float | None
    status: Status
    method: str
    note: str | None = None
    is_default: bool = True

    def __post_init__(self) -> None:
        has_value = self.status in (Status.OK, Status.UNRESOLVED)
        if has_value != (self.value is not None):
            raise ValueError(f"{self.metric}: status {self.status} does not fit value {self.value}")
        if self.value is not None and not isfinite(self.value):
            raise ValueError(f"{self.metric}: {self.value} is not a value; use status undefined or failed")
        if self.status is not Status.OK and not self.note:
            raise ValueError(f"{self.metric}: status {self.status} needs a note with the reason")
        if self.error is not None and not (isfinite(self.error) and self.error >= 0):
            raise ValueError(f"{self.metric}: error {self.error} is not a bound")


@dataclass(frozen=True, slots=True)
class Null:
    """What chance alone gives for a metric: mean and standard deviation of the metric under a named null model.

    ``sd`` is null where there is no closed form and fewer than two draws; ``draws`` is 0 for closed forms.
    """

    metric: str
    setting: str
    null: str
    mean: float
    sd: float | None
    draws: int
    method: str
    is_default: bool = True

    def __post_init__(self) -> None:
        if not isfinite(self.mean) or (self.sd is not None and not isfinite(self.sd)):
            raise ValueError(f"{self.metric}: null {self.null} is not finite; store none and say why")


def row(identity: Identity, item: Measurement | Null) -> dict[str, Any]:
    """One table row: the identity's columns beside the item's."""
    return {f.name: getattr(identity, f.name) for f in fields(identity)} | {
        f.name: str(v) if isinstance(v := getattr(item, f.name), Status) else v for f in fields(item)
    }


def setting(**parameters: Any) -> str:
    """The canonical ``key=value;...`` text of a metric's parameters, sorted by key (floats in their shortest form).

    >>> setting(view="bf16", eta=1e-3)
    'eta=0.001;view=bf16'
    """
    return ";".join(f"{k}={v}" for k, v in sorted(parameters.items()))


def parameters_of(text: str) -> dict[str, str]:
    """The parameters that a ``setting`` text names, as text: the inverse of ``setting``.

    >>> parameters_of("eta=0.001;view=bf16")
    {'eta': '0.001', 'view': 'bf16'}
    """
    return dict(part.split("=", 1) for part in text.split(";") if part)
