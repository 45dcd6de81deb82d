"""``geopd claims``: what a reader sees in the terminal."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from command_line import geopd
from synthetic_results import STUDY, Folder


@pytest.fixture(scope="module")
def folder(study_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(study_folder, tmp_path_factory.mktemp("claims") / "results")


def test_each_question_has_a_heading_and_each_claim_a_line_with_its_number(folder: Path) -> None:
    said = geopd("claims", folder)
    assert said.code == 0
    lines = said.out.splitlines()
    assert [line[:4] for line in lines if line.startswith("RQ")] == ["RQ1:", "RQ2:", "RQ3:"]
    numbers = [line.split()[0] for line in lines if line[:1] == " " and line.split()[:1] and line.split()[0][0] == "C"]
    assert [n for n in numbers if n[1:].isdigit()] == [f"C{i}" for i in (1, 2, 3, 4, 5, 14, *range(6, 14))]
    assert "same_origin@accuracy" not in said.out
    reasons = [line for line in lines if line.startswith("Unresolved")]
    assert reasons[0].startswith("Unresolved (C1, C1b, C2,")
    assert "one seed" in reasons[0]


def test_verdicts_over_seeds_come_with_what_decides_them_and_its_interval(tmp_path: Path) -> None:
    runs = [
        replace(run, name=f"{run.name}-s{seed}", seed=seed, size=run.size * (1 + 0.05 * seed))
        for run in STUDY
        for seed in range(3)
    ]
    root = Folder(tmp_path / "r", runs=tuple(runs), layers=1).write()
    entry = json.loads(geopd("claims", root, "--json").out)[0]
    (line,) = (line for line in geopd("claims", root).out.splitlines() if line.split()[:1] == ["C1"])
    assert "held" in line
    assert entry["comparisons"][0]["deciding"] in line
    assert " to ".join(f"{x:.3g}" for x in entry["interval"]) in line


def test_all_comparisons_are_listed_in_words_on_request(folder: Path) -> None:
    said = geopd("claims", folder, "--all").out
    for id_ in ("paper", "same_origin", "same_origin@steps", "same_origin@accuracy", "same_origin@norm", "paper@norm"):
        assert f" {id_} " in said
    assert "a Gaussian update of the same size shows it too" in said


def test_json_is_the_file_that_was_written_and_nothing_else(folder: Path) -> None:
    said = json.loads(geopd("claims", folder, "--json").out)
    assert said == json.loads((folder / "claims.json").read_text())
    assert said[0]["number"] == "C1"


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    assert "manifest.json" in geopd("claims", tmp_path).complaint()
