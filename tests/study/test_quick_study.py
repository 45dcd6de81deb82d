"""The whole path at the smallest scale, as a user runs it: train, measure, claims, report, and again to resume."""

import json

import polars as pl
import pytest

from geopd.study import run_study


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return run_study("quick", tmp_path_factory.mktemp("study"), quiet=True)


@pytest.mark.slow
def test_every_product_is_there(outcome):
    assert outcome.report.read_text(encoding="utf-8").lstrip().startswith("<!")
    assert json.loads((outcome.results / "claims.json").read_text())
    assert [note["title"] for note in json.loads((outcome.results / "notes.json").read_text())][-1] == "Stages"
    assert all((folder / "run.json").is_file() for folder in outcome.stages.values())


@pytest.mark.slow
def test_runs_are_measured_from_their_origins(outcome):
    runs = {row["run"]: row for row in pl.read_parquet(outcome.results / "runs.parquet").to_dicts()}
    assert set(runs) == {"sft", "opd", "rlvr", "sft_continued"}
    assert runs["opd"]["origin_digest"] == runs["rlvr"]["origin_digest"] == runs["sft_continued"]["origin_digest"]
    assert runs["sft"]["origin_digest"] != runs["opd"]["origin_digest"]
    assert (runs["sft"]["paradigm"], runs["rlvr"]["paradigm"]) == ("sft", "rlvr")
    table = pl.read_parquet(outcome.results / "measurements.parquet")
    assert set(table["run"]) == set(runs)
    assert table.filter(pl.col("status") == "failed").is_empty()


@pytest.mark.slow
def test_the_same_call_resumes_and_changes_nothing(outcome):
    before = (outcome.results / "measurements.parquet").read_bytes()
    again = run_study("quick", outcome.out, quiet=True)
    assert again.seconds < 30
    assert again.usage == outcome.usage
    assert (outcome.results / "measurements.parquet").read_bytes() == before
