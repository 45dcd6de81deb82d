"""Values of a tiny seeded pair are those checked in: counts exactly, spectra to 1e-12, everything else word for word."""

from __future__ import annotations

import json

import pytest
from regenerate import FILE, rows


def test_the_golden_table_is_unchanged() -> None:
    golden, found = json.loads(FILE.read_text(encoding="utf-8")), rows()
    assert len(golden) == len(found)
    for old, new in zip(golden, found, strict=True):
        values = {key: (old.pop(key, None), new.pop(key, None)) for key in ("value", "sd")}
        assert old == new
        for here, there in values.values():
            if old.get("exact") or here is None:
                assert here == there, old
            else:
                # angles are sums of many roundings and are kept in degrees
                slack = 1e-10 if old["metric"].endswith("_deg") else 1e-12
                assert there == pytest.approx(here, rel=1e-12, abs=slack), old


def test_every_metric_has_a_golden_value() -> None:
    from geopd.results import METRICS

    golden = json.loads(FILE.read_text(encoding="utf-8"))
    assert {row["metric"] for row in golden if row["value"] is not None} == set(METRICS)
