from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from command_line import geopd
from geopd.cli.check import check
from geopd.cli.claims import claims
from geopd.cli.export import export
from geopd.cli.report import report
from geopd.cli.show import show
from geopd.results import read_results
from geopd.results.summary import summarise
from synthetic_results import Folder, Run

app = typer.Typer()
for command in (show, check, export, report, claims):
    app.command()(command)


def run(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture
def folder(study_folder: Path, tmp_path: Path) -> Path:
    """A copy, for the commands that write."""
    return shutil.copytree(study_folder, tmp_path / "results")


@pytest.mark.parametrize("name", ["show", "check", "export", "report", "claims"])
def test_help_has_an_example(name: str) -> None:
    assert f"Example: geopd {name}" in " ".join(run(name, "--help").split())


def test_show_has_a_line_per_run_with_its_null_and_the_papers_numbers(study_folder: Path) -> None:
    out = run("show", study_folder)
    for said in (
        "8.4 %",
        "null 11.1 %",
        "paper, Qwen3-8B OPD",
        "start from 2 origins",
        "sft_continued: moved most",
        "rlvr: left out of the means: 5 undefined values",
        "opd: layers.2.mlp.up_proj could not be measured: the tensor holds <NaN> values",
    ):
        assert said in out, said
    assert out.index("sft_continued") < out.index("opd")


def test_show_json_is_json_alone_and_unrounded(study_folder: Path) -> None:
    content = json.loads(run("show", study_folder, "--json", "--top", "3"))
    expected = summarise(read_results(study_folder)).row(by_predicate=pl.col("run") == "opd", named=True)
    line = next(line for line in content["runs"] if line["run"] == "opd")
    assert line["update_sparsity"] == expected["update_sparsity"]
    assert [len(moved) for moved in content["movers"].values()] == [3] * 4
    assert len(content["origins"]) == 2


def test_show_survives_a_folder_with_one_checkpoint_and_markup_in_names(tmp_path: Path) -> None:
    tuned = Run("[bold]x[/nope]", "other", 0.02, steps=(None,))
    root = Folder(tmp_path / "r", runs=(tuned,), entrywise_only=True).write()
    assert "[bold]x[/nope]" in run("show", root)


def test_check_passes_fails_and_cannot_decide(study_folder: Path) -> None:
    assert "crossed by none of 28 matrices" in run(
        "check", study_folder, "--run", "sft", "--fail-if", "update_sparsity>0.9"
    )
    out = run("check", study_folder, "--run", "rlvr", "--fail-if", "update_sparsity>=0.1", code=1)
    assert "FAIL rlvr: update_sparsity>=0.1: crossed by 28 of 28 matrices" in out
    assert "… and 18 more" in out


def test_a_threshold_that_cannot_be_decided_fails(tmp_path: Path) -> None:
    tuned = Run("t", "other", 0.02, steps=(None,))
    root = Folder(tmp_path / "r", runs=(tuned,), layers=1, entrywise_only=True).write()
    out = run("check", root, "--fail-if", "stable_rank>9", code=1)
    assert "FAIL t: stable_rank>9: cannot be decided, no usable value" in out


def test_one_failing_threshold_of_several_fails_and_all_are_told(study_folder: Path) -> None:
    arguments = ("--fail-if", "hill_tail<0", "--fail-if", "update_sparsity>0.15", "--over", "mean")
    out = run("check", study_folder, *arguments, code=1)
    assert out.count("ok  ") == 7  # four runs for one, three for the other
    assert out.count("FAIL") == 1
    found = json.loads(run("check", study_folder, *arguments, "--json", code=1))
    assert [f["run"] for f in found if not f["passed"]] == ["rlvr"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fail-if", "update_sparcity>0.9"], "did you mean 'update_sparsity'"),
        (["--fail-if", "update_sparsity>0.9", "--run", "odp"], "has opd, rlvr, sft, sft_continued"),
        (["--fail-if", "update_sparsity>0.9", "--over", "layer"], "use 'matrix' or 'mean'"),
    ],
)
def test_unusable_thresholds_name_what_would_do(study_folder: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run("check", study_folder, *arguments)


def test_exported_tables_keep_every_digit_and_every_row(study_folder: Path, tmp_path: Path) -> None:
    run("export", study_folder, "--csv", tmp_path / "csv")
    results = read_results(study_folder)
    back = pl.read_csv(tmp_path / "csv" / "measurements.csv", schema=results.measurements.schema)
    assert back.equals(results.measurements)
    names = {"measurements", "nulls", "runs", "evaluations", "summary"}
    assert {path.stem for path in (tmp_path / "csv").iterdir()} == names
    runs = pl.read_csv(tmp_path / "csv" / "runs.csv")
    assert runs["steps"][0] == "20;40;60;80;100;120"
    with pytest.raises(ValueError, match="is a file; name a folder"):
        run("export", study_folder, "--csv", tmp_path / "csv" / "runs.csv")


def test_claims_print_and_write_the_same(folder: Path) -> None:
    told = json.loads(run("claims", folder, "--json"))
    assert told == json.loads((folder / "claims.json").read_text())
    out = run("claims", folder)
    assert "bf16 sparsity" in out
    assert re.search(r"Unresolved \([C0-9b, ]+\): one seed", out)


def test_report_prints_the_pages_path(tmp_path: Path) -> None:
    root = Folder(tmp_path / "r", runs=(Run("t", "other", 0.02, steps=(None,)),), layers=1, evaluated=False).write()
    assert run("report", root).strip() == str(root / "report.html")
    assert (root / "report.html").is_file()


def test_a_folder_without_results_is_refused_by_every_command(tmp_path: Path) -> None:
    for arguments in (
        ["show"],
        ["check", "--fail-if", "hill_tail<1"],
        ["export", "--csv", "x"],
        ["report"],
        ["claims"],
    ):
        with pytest.raises(ValueError, match=r"no manifest\.json here"):
            run(arguments[0], tmp_path, *arguments[1:])


def test_everything_runs_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    tuned = Run("t", "other", 0.02, steps=(None,))
    root = Folder(tmp_path / "r", runs=(tuned,), layers=1, evaluated=False, entrywise_only=True).write()
    code = """
import sys
sys.modules["torch"] = None
from pathlib import Path
from geopd.cli.check import check
from geopd.cli.claims import claims
from geopd.cli.export import export
from geopd.cli.report import report
from geopd.cli.show import show
assert not {"polars", "matplotlib", "rich.table"} & set(sys.modules), "heavy imports belong inside the commands"
root = Path(sys.argv[1])
show(root)
check(root, ["update_sparsity>0.99"])
export(root, root / "csv")
claims(root)
report(root)
"""
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (root / "report.html").is_file()


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("geopd.results.read_results", interrupted)
    found = geopd("show", tmp_path)
    assert found.code == 1
    assert found.err == "geopd: stopped; what had finished is kept, the same command goes on from there\n"
