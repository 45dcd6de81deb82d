"""Values of a tiny seeded pair stay as checked in: counts exactly, spectra to 1e-12, the rest word for word."""

from __future__ import annotations

import json
from typing import Any

import pytest
from regenerate import FILE, rows

from geopd.results import METRICS

KEY = ("dtype", "step", "metric", "setting", "null")


def keyed(table: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {tuple(row.get(column) for column in KEY): row for row in table}


def test_the_golden_table_is_unchanged() -> None:
    golden, found = keyed(json.loads(FILE.read_text(encoding="utf-8"))), keyed(rows())
    assert set(golden) == set(found), "rows came or went: if that is meant, python tests/golden/regenerate.py"
    for key, old in golden.items():
        new = found[key]
        assert new.keys() == old.keys()
        for column in old.keys() - {"error"}:
            here, there = old[column], new[column]
            if column in ("value", "sd") and not old.get("exact") and here is not None:
                # angles are sums of many roundings and are kept in degrees
                slack = 1e-10 if old["metric"].endswith("_deg") else 1e-12
                # an iterative method promises its error bound and no more
                slack = max(slack, error if (error := old.get("error") or 0.0) > 1e-9 * abs(here) else 0.0)
                assert there == pytest.approx(here, rel=1e-12, abs=slack), key
            else:
                assert there == here, key


def test_every_metric_has_a_golden_value() -> None:
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    assert {row["metric"] for row in golden if row["value"] is not None} == set(METRICS)
