"""A measurement cannot say two things at once, and the tables' columns are the documented contract."""

from __future__ import annotations

import math

import polars as pl
import pytest

from geopd.results import (
    KEY,
    MEASUREMENTS,
    NULLS,
    RUNS,
    Identity,
    Measurement,
    Null,
    Status,
    parameters_of,
    row,
    setting,
)


@pytest.mark.parametrize(
    ("value", "error", "status", "note"),
    [
        (None, None, Status.OK, None),
        (None, None, Status.UNDEFINED, None),
        (0.0, None, Status.UNDEFINED, "zero instead of null"),
        (1.0, None, Status.FAILED, "a value that failed"),
        (None, None, Status.UNRESOLVED, "no value kept"),
        (1.0, 0.5, Status.UNRESOLVED, None),
        (math.nan, None, Status.OK, None),
        (math.inf, None, Status.OK, None),
        (1.0, -1.0, Status.OK, None),
        (1.0, math.nan, Status.OK, None),
        (1.0, math.inf, Status.OK, None),
    ],
)
def test_contradictions_are_refused(value: float | None, error: float | None, status: Status, note: str | None) -> None:
    with pytest.raises(ValueError, match="stable_rank"):
        Measurement("stable_rank", "view=native", value, error, status, "svd", note)


@pytest.mark.parametrize(("mean", "sd"), [(math.nan, None), (math.inf, 1.0), (1.0, math.nan)])
def test_a_null_is_finite(mean: float, sd: float | None) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Null("stable_rank", "view=native", "gaussian", mean, sd, 0, "closed form")


def test_settings_are_explicit_and_sorted() -> None:
    assert setting(view="bf16", rank="64", alpha=0.5, eta=1e-3) == "alpha=0.5;eta=0.001;rank=64;view=bf16"
    assert setting(eta=1e-7) == "eta=1e-07"


def test_settings_are_read_back() -> None:
    assert parameters_of(setting(view="bf16", rank="p/8", alpha=0.5)) == {"alpha": "0.5", "rank": "p/8", "view": "bf16"}
    assert parameters_of("") == {}


def test_columns_of_the_contract() -> None:
    identity = {
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
    value = {"value": pl.Float64, "error": pl.Float64, "status": pl.String, "method": pl.String, "note": pl.String}
    null = {"null": pl.String, "mean": pl.Float64, "sd": pl.Float64, "draws": pl.Int64, "method": pl.String}
    assert dict(MEASUREMENTS) == identity | value
    assert dict(NULLS) == identity | null
    assert KEY == ("run", "step", "other_run", "matrix", "metric", "setting")
    assert {"run", "paradigm", "seed", "origin", "digests", "tags"} <= set(RUNS)


def test_a_row_has_every_column_and_plain_values() -> None:
    identity = Identity("opd", None, "embed_tokens", None, "embedding", 9, 4)
    item = Measurement("stable_rank", "view=native", None, None, Status.UNDEFINED, "definition", "zero")
    made = row(identity, item)
    assert set(made) == set(MEASUREMENTS)
    assert type(made["status"]) is str
    null = Null("stable_rank", "view=native", "gaussian", 1.0, None, 0, "closed form")
    assert set(row(identity, null)) == set(NULLS)
