"""What the scheduler runs, when, and what it leaves behind; the stages here are stand-ins of a few milliseconds."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from geopd.study.outcome import study_notes, write_notes
from geopd.study.recipe import CORE, QUICK
from geopd.study.run import run_study
from geopd.study.schedule import Schedule, StageFailedError, read_marker
from geopd.study.stages import Locked, Parent, Phase, Scale, Stage, stage_from_json, stage_key, stage_seed
from geopd.training import ModelShape, OptimiserSettings

# Writes the marker as a stage would, a line to a shared journal, and obeys two switches in the stage's learning rate.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
description = json.loads((folder / "stage.json").read_text())
journal = folder.parent.parent / "journal.txt"
with journal.open("a") as lines:
    lines.write("start " + description["stage"]["name"] + "\\n")
for path in description["parents"].values():
    assert (folder / path).is_dir(), path
rate = description["stage"]["optimiser"]["learning_rate"]
if rate == 13.0:
    sys.exit("ValueError: thirteen is not a learning rate")
time.sleep(30 if rate == 99.0 else 0.1)
for step in description["stage"]["saved"]:
    (folder / f"checkpoint-{step}").mkdir()
marker = {"key": description["key"], "weights": {str(s): f"{rate}" for s in description["stage"]["saved"]},
          "accuracy": [], "usage": {"core_seconds": 0.1}}
(folder / "finished.json").write_text(json.dumps(marker))
with journal.open("a") as lines:
    lines.write("end " + description["stage"]["name"] + "\\n")
"""


def stage(name, start=None, teacher=None, rate=1.0, cost=1.0):
    return Stage(
        name=name,
        paradigm="other",
        optimiser=OptimiserSettings(2, rate),
        saved=(1, 2),
        shape=None if start else ModelShape(),
        start=Parent(start, 2) if start else None,
        teacher=Parent(teacher, 2) if teacher else None,
        phases=(Phase(2, "arithmetic"),),
        cost=cost,
    )


def scale(rate=1.0, child_rate=1.0):
    stages = (
        stage("base", rate=rate, cost=5),
        stage("teacher", cost=9),
        stage("sft", "base"),
        stage("opd", "sft", "teacher", rate=child_rate),
        stage("rlvr", "sft"),
    )
    return Scale("test", "A test.", stages, ("opd", "rlvr"))


class StandIns:
    """A launcher of stand-ins, each a process of its own."""

    def start(self, folder):
        with (folder / "log.txt").open("wb") as log:
            command = [sys.executable, "-S", "-c", STAND_IN, str(folder)]
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def close(self):
        pass


def run(chosen, folder, workers=2, **kwargs):
    schedule = Schedule(chosen, folder / "stages", workers, launcher=StandIns(), **kwargs)
    schedule.run()
    return schedule


def journal(folder):
    path = folder / "journal.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def started(folder):
    return {line.split()[1] for line in journal(folder) if line.startswith("start")}


def test_parents_end_before_children_start_and_two_run_at_once(tmp_path):
    schedule = run(scale(), tmp_path)
    lines = journal(tmp_path)
    for child, parents in {"sft": ["base"], "opd": ["sft", "teacher"], "rlvr": ["sft"]}.items():
        assert all(lines.index(f"end {parent}") < lines.index(f"start {child}") for parent in parents)
    running = [sum(1 if line.startswith("start") else -1 for line in lines[: i + 1]) for i in range(len(lines))]
    assert max(running) == 2
    assert {status.state for status in schedule.statuses.values()} == {"finished"}
    assert sorted(p.name for p in (tmp_path / "stages").iterdir()) == ["base", "opd", "rlvr", "sft", "teacher"]


def test_the_longest_chain_starts_first(tmp_path):
    run(scale(), tmp_path, workers=1)
    assert journal(tmp_path)[0] == "start teacher"


def test_finished_stages_are_not_run_again(tmp_path):
    run(scale(), tmp_path)
    journal(tmp_path)
    again = run(scale(), tmp_path)
    assert started(tmp_path) == set()
    assert {status.state for status in again.statuses.values()} == {"resumed"}


def test_a_changed_setting_reruns_the_stage_and_its_dependents_only(tmp_path):
    run(scale(), tmp_path)
    journal(tmp_path)
    run(scale(child_rate=0.5), tmp_path)
    assert started(tmp_path) == {"opd"}
    run(scale(rate=0.5, child_rate=0.5), tmp_path)
    assert started(tmp_path) == {"base", "sft", "opd", "rlvr"}


def test_a_removed_stage_is_redone_without_its_unchanged_children(tmp_path):
    run(scale(), tmp_path)
    journal(tmp_path)
    (tmp_path / "stages" / "sft" / "finished.json").unlink()
    run(scale(), tmp_path)
    assert started(tmp_path) == {"sft"}


def test_what_a_killed_run_left_is_removed(tmp_path):
    leftover = tmp_path / "stages" / ".sft.partial"
    leftover.mkdir(parents=True)
    (leftover / "checkpoint-1").mkdir()
    (leftover / "finished.json").write_text("{}")
    run(scale(), tmp_path)
    assert not leftover.exists()
    assert read_marker(tmp_path / "stages", "sft")["weights"] == {"1": "1.0", "2": "1.0"}


def test_a_failing_stage_is_named_with_its_reason_and_log(tmp_path):
    with pytest.raises(StageFailedError, match=r"stage opd failed: ValueError: thirteen.*log\.txt"):
        run(scale(child_rate=13.0), tmp_path)
    assert (tmp_path / "stages" / ".opd.partial" / "log.txt").exists()
    assert read_marker(tmp_path / "stages", "sft") is not None
    assert run(scale(), tmp_path).statuses["opd"].state == "finished"


def test_an_interrupt_ends_the_processes_and_the_next_run_goes_on(tmp_path):
    class Interrupt:
        def __call__(self, statuses):
            if statuses["opd"].state == "running":
                raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(scale(child_rate=99.0), tmp_path, report=Interrupt())
    assert time.monotonic() - begun < 20
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in left
    assert not list((tmp_path / "stages").glob(".*.partial"))
    journal(tmp_path)
    run(scale(), tmp_path)
    assert "sft" not in started(tmp_path)


def test_a_broken_marker_is_named(tmp_path):
    folder = tmp_path / "stages" / "base"
    folder.mkdir(parents=True)
    (folder / "finished.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        run(scale(), tmp_path)


@pytest.mark.parametrize("chosen", [QUICK, CORE], ids=lambda s: s.name)
def test_recipes_are_sound(chosen):
    stages = {s.name: s for s in chosen.stages}
    for name in ("opd", "rlvr", "sft", "sft_continued"):
        assert len(stages[name].saved) >= 5
    compared = [stages[name].optimiser for name in chosen.measured]
    for setting in ("beta1", "beta2", "epsilon", "weight_decay", "clip_norm"):
        assert len({getattr(optimiser, setting) for optimiser in compared}) == 1, setting
    anchor = stages["opd"].start
    assert stages["rlvr"].start == stages["sft_continued"].start == anchor
    assert anchor.step == stages["sft"].saved[-1]
    for s in chosen.stages:
        assert replace(stage_from_json(json.loads(json.dumps(s.settings()))), cost=s.cost) == s


def test_core_evaluates_enough_held_out_problems():
    assert all(s.evaluation.held_out >= 2000 for s in CORE.stages)


def test_keys_follow_what_decides_a_result():
    base = stage("base")
    key = stage_key(base, [])
    assert key == stage_key(replace(base, cost=7.0), [])
    assert key != stage_key(replace(base, seed=1), [])
    assert key != stage_key(replace(base, batch=32), [])
    assert key != stage_key(base, [{"key": "a", "weights": "b"}])
    assert len({stage_seed(replace(s, seed=seed)) for s in CORE.stages for seed in range(3)}) == 18
    assert stage_seed(replace(base, name="other", draws="base")) == stage_seed(base)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shape": None}, "either a checkpoint to start from or a shape"),
        ({"phases": ()}, "either supervised phases"),
        ({"phases": (Phase(1, "arithmetic"),)}, "add up to 2"),
        ({"saved": (2, 1)}, "must ascend"),
        ({"saved": (1,)}, "end at 2"),
        ({"locked": Locked("update", 4)}, "needs an origin and weight decay 0"),
    ],
)
def test_contradictory_stages_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        replace(stage("base"), **change)


def test_scales_refuse_unknown_parents_and_measured_stages():
    with pytest.raises(ValueError, match="needs base"):
        Scale("x", "", (stage("sft", "base"),), ())
    with pytest.raises(ValueError, match="unknown stages"):
        Scale("x", "", (stage("base"),), ("opd",))
    with pytest.raises(ValueError, match="a stage twice"):
        Scale("x", "", (stage("base"), stage("base")), ())


def test_a_second_study_in_the_same_folder_is_refused(tmp_path):
    import fcntl

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another study is running"):
            run_study("quick", tmp_path)
    with pytest.raises(ValueError, match="scale 'huge'"):
        run_study("huge", tmp_path)


def with_seeds(chosen, seed):
    return replace(chosen, stages=tuple(replace(s, seed=seed) for s in chosen.stages))


def test_notes_say_what_the_miniature_is(tmp_path):
    run(scale(), tmp_path)
    notes = study_notes(with_seeds(scale(), 4), tmp_path / "stages")
    assert {"title", "text"} == set(notes[0])
    text = json.dumps(notes)
    for said in ("p/8", "p/64", "Seeds 4", "8B", "| opd | sft at step 2 |"):
        assert said in text
    path = write_notes(tmp_path, notes)
    assert json.loads(path.read_text()) == notes
