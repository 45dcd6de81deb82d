"""The store: parts are committed whole or not at all, and tables depend on nothing but the parts' content."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from geopd.results import (
    EVALUATIONS,
    MEASUREMENTS,
    NULLS,
    RUNS,
    Identity,
    Measurement,
    Null,
    Part,
    Status,
    Store,
    digest_of,
    read_results,
    row,
    write_json,
)

TABLES = {"runs": pl.DataFrame(schema=RUNS), "evaluations": pl.DataFrame(schema=EVALUATIONS)}


def part(key: str, run: str = "opd", step: int | None = 3, value: float | None = 0.25) -> Part:
    identity = Identity(run, step, f"layers.{key}.q_proj", 0, "q_proj", 4, 4)
    status = Status.OK if value is not None else Status.UNDEFINED
    item = Measurement("stable_rank", "view=native", value, None, status, "svd", None if value is not None else "zero")
    null = Null("stable_rank", "view=native", "gaussian", 1.5, None, 0, "closed form")
    vectors = {"3/sigma": np.array([2.0, 1.0])}
    return Part(key, [row(identity, item)], [row(identity, null)], vectors, {"seconds": 0.1, "retry": False})


def test_a_part_is_there_once_committed(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    assert not store.has("a")
    store.commit(part("a"))
    assert store.has("a")
    assert store.record("a") == {"seconds": 0.1, "retry": False}
    assert Store(tmp_path / "out").has("a"), "another process sees it"
    with np.load(tmp_path / "out" / "vectors" / "a.npz") as vectors:
        assert vectors["3/sigma"].tolist() == [2.0, 1.0]


def test_tables_do_not_depend_on_the_order_of_commits(tmp_path: Path) -> None:
    parts = [part(key, run, step) for key, run, step in (("a", "opd", 3), ("b", "sft", None), ("c", "opd", 12))]
    for name, order in (("one", parts), ("two", parts[::-1])):
        store = Store(tmp_path / name)
        for item in order:
            store.commit(item)
        store.fold([item.key for item in order], TABLES, {"parts": {}})
    for table in ("measurements", "nulls"):
        one, two = (tmp_path / name / f"{table}.parquet" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    frame = pl.read_parquet(tmp_path / "one" / "measurements.parquet")
    assert frame.schema == MEASUREMENTS
    assert pl.read_parquet(tmp_path / "one" / "nulls.parquet").schema == NULLS
    assert frame["step"].to_list() == [3, 12, None]


def test_values_survive_to_the_last_bit(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    store = Store(tmp_path)
    store.commit(part("a", value=value))
    store.commit(part("b", value=None))
    store.fold(["a", "b"], TABLES, {"parts": {"opd": {"layers.a.q_proj": "a"}}})
    results = read_results(tmp_path)
    assert results.measurements["value"].to_list() == [value, None]
    assert results.nulls["sd"].to_list() == [None, None]
    assert results.vectors("opd", "layers.a.q_proj")["3/sigma"].tolist() == [2.0, 1.0]
    assert results.vectors("opd", "no such matrix") == {}


def test_a_commit_cut_short_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)

    def cut(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", cut)
        with pytest.raises(OSError, match="Input/output error"):
            store.commit(part("a"))
    assert not store.has("a")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    store.commit(part("a"))
    assert store.has("a")


def test_a_part_gets_its_name_by_a_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever dies before the rename has written nothing that a reader takes for a part."""
    store = Store(tmp_path)
    complete: list[bool] = []

    def die(temporary: Path, target: Path) -> None:
        complete.append(temporary.stat().st_size > 0 and not target.exists())
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        with pytest.raises(OSError, match="Input/output error"):
            store.commit(part("a"))
    assert complete == [True]
    assert not store.has("a")


def test_discarding_a_part(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.commit(part("a"))
    store.discard(["a", "never there"])
    assert not store.has("a")
    assert list((tmp_path / "vectors").iterdir()) == []


def test_an_empty_folder_folds(tmp_path: Path) -> None:
    Store(tmp_path).fold([], TABLES, {"parts": {}})
    assert read_results(tmp_path).measurements.is_empty()


def test_digests_ignore_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert digest_of({"a": [1, 2]}) != digest_of({"a": [2, 1]})
    assert digest_of({"a": 1}) != digest_of({"a": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        digest_of({"a": float("nan")})


def test_json_files_refuse_what_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "manifest.json", {"a": float("inf")})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_results_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest\.json here; name a folder written by `geopd measure --out`"):
        read_results(tmp_path)
    Store(tmp_path).fold([], TABLES, {"parts": {}})
    pl.DataFrame({"run": ["a"]}).write_parquet(tmp_path / "nulls.parquet")
    with pytest.raises(ValueError, match=r"nulls\.parquet: lacks the column\(s\) step"):
        read_results(tmp_path)
    (tmp_path / "nulls.parquet").unlink()
    with pytest.raises(ValueError, match=r"nulls\.parquet: missing; run `geopd measure"):
        read_results(tmp_path)
