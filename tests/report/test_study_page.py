from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from geopd.claims import decide_claims
from geopd.report import write_report
from geopd.report.claims_table import claims_table, parts
from geopd.report.drawing import Subject
from geopd.report.gallery import FIGURES, STUDY_FIGURES
from geopd.report.study_tables import Table, study_tables
from geopd.report.tables import headline, moved_most, show_half
from geopd.results import read_results
from geopd.results.summary import aggregate, rows_of
from synthetic_results import STUDY, Folder, write_notes


class Text(HTMLParser):
    """The words of a page and its ids."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, _: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def subject(full_folder: Path) -> Subject:
    return Subject.of(read_results(full_folder))


@pytest.fixture(scope="module")
def tables(subject: Subject) -> dict[str, Table]:
    return {table.name: table for table in study_tables(subject)}


def test_the_page_of_a_study_has_its_abstract_figures_and_tables(full_report: Path) -> None:
    page = Text(full_report.read_text())
    assert len(page.ids) == len(set(page.ids))
    assert {"abstract", "claims", "tables", "table_costs"} <= set(page.ids)
    assert sum(name.startswith("figure-") and "-" not in name[7:] for name in page.ids) == len(FIGURES + STUDY_FIGURES)
    text = " ".join(page.words)
    for said in ("RQ1. Where in parameter space", "What chance would give:", "How to read it:", "3 seeds", "± "):
        assert said in text
    assert full_report.stat().st_size < 6_000_000


def test_the_headline_has_a_line_a_baseline_and_the_others_apart(subject: Subject) -> None:
    about = headline(subject)
    assert [line["run"] for line in about["lines"]] == ["sft", "sft_continued", "opd", "rlvr"]
    assert {line["seeds"] for line in about["lines"]} == {3}
    assert len(about["others"]) == len(subject.groups) - 4
    means = aggregate(rows_of(subject.results, "stable_rank")).filter(pl.col("run").str.starts_with("opd-s"))
    seeds = means.filter(pl.col("run").str.contains(r"^opd-s\d$"))["value"]
    cell = about["lines"][2]["cells"][5]
    assert cell["value"] == f"{seeds.mean():.3g}"
    assert cell["half"] == f"± {4.302652729911275 * seeds.std() / 3**0.5:.3g}"
    assert about["origins"] == subject.results.runs["origin_digest"].n_unique() == 6  # a base and an anchor per seed
    assert about["own_origins"] == 3


def test_seeds_that_share_an_origin_are_not_said_to_have_their_own(subject: Subject) -> None:
    shared = subject.results.runs.with_columns(origin_digest=pl.col("origin"))
    about = headline(replace(subject, results=replace(subject.results, runs=shared)))
    assert (about["origins"], about["own_origins"]) == (2, 0)


def test_a_small_half_interval_of_a_share_is_not_rounded_away() -> None:
    assert show_half("update_sparsity", 0.00021) == "± 0.021 %"
    assert show_half("stable_rank", 0.125) == "± 0.125"
    assert show_half("rotation", 0.5) == "± 0.5°"


def test_an_ordinary_folder_keeps_one_line_a_run_and_has_no_study_tables(study_folder: Path) -> None:
    plain = Subject.of(read_results(study_folder))
    about = headline(plain)
    assert [line["run"] for line in about["lines"]] == ["sft", "sft_continued", "opd", "rlvr"]
    assert about["others"] == []
    assert {cell["half"] for line in about["lines"] for cell in line["cells"]} == {""}
    assert study_tables(plain) == []
    assert [table["run"] for table in moved_most(plain)] == ["sft", "sft_continued", "opd", "rlvr"]


def test_every_kind_of_run_has_a_table(tables: dict[str, Table]) -> None:
    assert set(tables) == {
        "table_sparsity",
        "table_runs",
        "table_variants",
        "table_projections",
        "table_controls",
        "table_rates",
        "table_costs",
    }
    for table in tables.values():
        assert all(len(row) == len(table.head) for row in table.rows), table.name


def test_tables_name_runs_after_their_tags_and_count_their_seeds(tables: dict[str, Table]) -> None:
    assert tables["table_variants"].rows[0][0] == ("opd", "3 seeds")
    assert tables["table_variants"].rows[1][0] == ("opd: variant strings", "one seed")
    assert tables["table_projections"].rows[0][0] == ("OPD free", "3 seeds")
    seeds = {row[0][0]: row[2][0] for row in tables["table_runs"].rows}
    assert seeds["rlvr"] == "0, 1, 2"


def test_a_variant_with_a_student_of_its_own_is_not_said_to_start_where_the_baselines_start(subject: Subject) -> None:
    other = pl.when(pl.col("run") == "opd-strings-s0").then(pl.lit("x")).otherwise(pl.col("origin_digest"))
    runs = subject.results.runs.with_columns(origin_digest=other)
    found = study_tables(replace(subject, results=replace(subject.results, runs=runs)))
    (table,) = [t for t in found if t.name == "table_runs"]
    starts = {row[0][0]: row[-1][0] for row in table.rows}
    assert starts["opd: variant strings"] == starts["sft"] == "its own origin"
    assert starts["opd"] == starts["opd: rollouts teacher"] == "origin of the on-policy baselines"


def test_a_table_names_the_place_of_the_settings_only_where_there_is_one(full_folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(full_folder, tmp_path / "results")
    for place in (None, ("notes", "About these runs")):
        if place:
            write_notes(root)
        (table,) = [t for t in study_tables(Subject.of(read_results(root))) if t.name == "table_runs"]
        assert table.place == place
        assert ("Tables 2 to 5" in table.note) == bool(place)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ({"margin": None, "values": {"0": 1.0, "1": 2.0}}, "95%, 2 seeds"),
        ({"margin": 0.1, "values": {"0": 1.0, "1": 2.0, "2": 1.0}}, "90%, 3 seeds"),
        ({"margin": 0.1, "values": {"0": 1.0}}, "90%, one seed by the baselines' spread"),
        ({"margin": None, "values": {"0": 1.0}, "interval": None}, ""),
    ],
)
def test_an_interval_is_shown_with_its_level_and_what_it_is_over(statement: dict[str, object], said: str) -> None:
    plain = {"text": "a < b", "estimate": 1.0, "interval": [0.5, 1.5], "null_estimate": None, "explained_share": None}
    (part,) = parts({"statements": [plain | statement]})
    assert part["kind"] == said


def test_costs_are_folded_over_seeds_and_added_up(subject: Subject, tables: dict[str, Table]) -> None:
    costs = subject.results.costs
    table = tables["table_costs"]
    lines = {row[0][0]: [cell[0] for cell in row[1:]] for row in table.rows}
    assert lines["opd"] == ["3", "160", "64", "12", "76", "240,000", "858"]
    assert f"{sum(row['core_seconds'] for row in costs):,.0f} core seconds" in table.note


def test_a_stage_that_is_no_run_has_its_costs_too(full_folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(full_folder, tmp_path / "results")
    stage = {"stage": "teacher", "paradigm": "other", "seed": None, "tags": None, "steps": 900, "tokens": None}
    (root / "costs.json").write_text(json.dumps([stage]))
    (table,) = [t for t in study_tables(Subject.of(read_results(root))) if t.name == "table_costs"]
    assert [cell[0] for cell in table.rows[0]] == ["teacher", "1", "900", "–", "–", "–", "–", "–"]


def test_gradients_and_costs_are_empty_where_no_file_is(study_folder: Path, full_folder: Path) -> None:
    plain, full = read_results(study_folder), read_results(full_folder)
    assert plain.gradients == plain.costs == []
    assert len(full.gradients) == 9
    assert {row["stage"] for row in full.costs} == set(full.runs["run"])


def test_claims_are_shown_by_question_with_what_speaks_for_them_first(full_folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(full_folder, tmp_path / "results")
    decide_claims(root)
    about = claims_table(read_results(root))
    assert [section["question"] for section in about["sections"]] == ["RQ1", "RQ2", "RQ3"]
    for line, claim in zip(about["lines"], read_results(root).claims, strict=True):
        shown = [*line["comparisons"], *line["folded"], *line["matched"]]
        assert sorted(c["id"] for c in shown) == sorted(c["id"] for c in claim["comparisons"])
        assert claim["summary"] in [c["id"] for c in line["comparisons"][:1] + line["matched"]]


def test_claims_of_earlier_versions_are_shown_without_an_abstract(tmp_path: Path) -> None:
    root = Folder(tmp_path / "r", runs=STUDY[1:3], layers=1, entrywise_only=True).write()
    decide_claims(root)
    later = (
        "number",
        "question",
        "beyond_null",
        "explained",
        "estimate",
        "interval",
        "seeds",
        "seeds_needed",
        "summary",
    )
    old = [{k: v for k, v in c.items() if k not in later} for c in read_results(root).claims]
    for claim in old:
        claim["comparisons"] = [
            {k: v for k, v in c.items() if k not in (*later, "matched", "deciding")} for c in claim["comparisons"][:2]
        ]
    (root / "claims.json").write_text(json.dumps(old))
    page = Text(write_report(root).read_text())
    assert "claims" in page.ids
    assert "abstract" not in page.ids
