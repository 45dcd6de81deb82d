"""Run a study's stages in the order their parents allow, two processes at a time, and resume where a run stopped.

A stage is written in ``stages/.<name>.partial`` and renamed to ``stages/<name>`` behind its marker ``finished.json``.
The marker's key digests the stage's settings and the keys and weights of its parents: the same key is not
run twice, another key (or none) runs the stage again and, through the keys, whatever depends on it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geopd.study.stage_server import Launcher, StageProcess, StageServer
from geopd.study.stages import Scale, Stage, partial_folder, stage_folder, stage_key

__all__ = ["Schedule", "StageFailedError", "StageStatus", "predicted_minutes", "read_marker"]

_POLL_SECONDS = 0.2
_TERMINATION_SECONDS = 5.0
_MEASURING_SECONDS = 1.0  # core-seconds a checkpoint, claims and report included


class StageFailedError(RuntimeError):
    """A stage's process ended with an error; the text names the stage and its log."""


@dataclass(slots=True)
class StageStatus:
    """What the progress display knows of a stage.

    Args:
        share: finished share of the work, 0 to 1.
        state: waiting, running, finished, or resumed (finished by an earlier run).
        doing: what the stage's process last said.
    """

    share: float = 0.0
    state: str = "waiting"
    doing: str = ""


def read_marker(stages: Path, name: str) -> dict[str, Any] | None:
    """The marker of a finished stage, or None when it never finished.

    Raises:
        ValueError: the marker is not JSON.
    """
    path = stage_folder(stages, name) / "finished.json"
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: remove {path.parent} and run the study again ({error})") from error
    return content


def work_behind(scale: Scale) -> dict[str, float]:
    """By stage: expected core-seconds of the longest chain of stages that begins with it."""
    behind: dict[str, float] = {}
    for stage in reversed(scale.stages):  # parents come before children
        behind[stage.name] = stage.cost + behind.get(stage.name, 0.0)
        for parent in stage.parents:
            behind[parent.stage] = max(behind.get(parent.stage, 0.0), behind[stage.name])
    return behind


def predicted_minutes(scale: Scale, workers: int = 2) -> float:
    """Expected minutes of a scale on idle cores: training and evaluation, measuring, claims and report."""
    checkpoints = sum(len(stage.saved) for stage in scale.stages if stage.name in scale.measured)
    training = max(sum(stage.cost for stage in scale.stages) / workers, max(work_behind(scale).values()))
    return (training + checkpoints * _MEASURING_SECONDS / workers) / 60


@dataclass
class Schedule:
    """The stages of a scale under one output folder.

    Args:
        scale: what to run.
        stages: the folder of stage folders.
        workers: stage processes at a time, one thread each.
        report: called with all statuses a few times a second.
        launcher: what starts the stages' processes; a server of its own by default.
    """

    scale: Scale
    stages: Path
    workers: int = 2
    report: Callable[[dict[str, StageStatus]], None] | None = None
    launcher: Launcher | None = None
    statuses: dict[str, StageStatus] = field(init=False)
    _behind: dict[str, float] = field(init=False)
    _running: dict[str, StageProcess] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.statuses = {stage.name: StageStatus() for stage in self.scale.stages}
        self._behind = work_behind(self.scale)

    def run(self) -> None:
        """Finish every stage. On any exception, Ctrl-C included, the running processes are ended first.

        Raises:
            StageFailedError: a stage's process ended with an error.
        """
        self.stages.mkdir(parents=True, exist_ok=True)
        try:
            while any(status.share < 1.0 for status in self.statuses.values()):
                self._start_ready()
                self._collect()
                if self.report:
                    self.report(self.statuses)
                if self._running:
                    time.sleep(_POLL_SECONDS)
        finally:
            self._terminate()

    def _start_ready(self) -> None:
        """Start, or recognise as finished, every stage whose parents are finished, longest line of work first."""
        waiting = [stage for stage in self.scale.stages if self.statuses[stage.name].state == "waiting"]
        for stage in sorted(waiting, key=lambda stage: self._behind[stage.name], reverse=True):
            if len(self._running) >= self.workers:
                return
            if all(self.statuses[parent.stage].share >= 1.0 for parent in stage.parents):
                key = stage_key(stage, [self._parent_identity(stage, i) for i in range(len(stage.parents))])
                marker = read_marker(self.stages, stage.name)
                if marker is not None and marker["key"] == key:
                    self.statuses[stage.name] = StageStatus(1.0, "resumed")
                else:
                    self._start(stage, key)

    def _parent_identity(self, stage: Stage, index: int) -> dict[str, Any]:
        parent = stage.parents[index]
        marker = read_marker(self.stages, parent.stage)
        if marker is None:
            raise StageFailedError(f"stage {parent.stage} disappeared while {stage.name} waited: run the study again")
        return {"key": marker["key"], "weights": marker["weights"][str(parent.step)]}

    def _start(self, stage: Stage, key: str) -> None:
        folder = partial_folder(self.stages, stage.name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        description = {
            "stage": stage.settings(),
            "key": key,
            # Relative to the stage's folder, whose siblings the parents are: the study can be moved as a whole.
            "parents": {role: f"../{p.stage}/checkpoint-{p.step}" for role, p in stage.roles.items()},
        }
        (folder / "stage.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        self.launcher = self.launcher or StageServer(self.stages / ".server.log")
        self._running[stage.name] = self.launcher.start(folder)
        self.statuses[stage.name] = StageStatus(0.0, "running", "starting")

    def _collect(self) -> None:
        for name, process in list(self._running.items()):
            code = process.poll()
            if code is None:
                self._read_progress(name)
                continue
            del self._running[name]
            if code != 0:
                raise StageFailedError(self._failure(name, code))
            self._commit(name)

    def _read_progress(self, name: str) -> None:
        try:
            content = json.loads((partial_folder(self.stages, name) / "progress.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return  # not written yet, or already removed by a stage about to end
        # 1 is for the scheduler to say, once the folder has its final name.
        self.statuses[name].share = min(float(content["share"]), 0.99)
        self.statuses[name].doing = str(content["doing"])

    def _failure(self, name: str, code: int) -> str:
        log = partial_folder(self.stages, name) / "log.txt"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = lines[-1] if lines else f"no output; exit status {code}, and -9 often means that memory ran out"
        return f"stage {name} failed: {why} (its whole output: {log})"

    def _commit(self, name: str) -> None:
        folder, target = partial_folder(self.stages, name), stage_folder(self.stages, name)
        if not (folder / "finished.json").is_file():
            raise StageFailedError(f"stage {name} ended without its marker: see {folder / 'log.txt'}")
        shutil.rmtree(target, ignore_errors=True)
        folder.replace(target)
        self.statuses[name] = StageStatus(1.0, "finished")

    def _terminate(self) -> None:
        for process in self._running.values():
            process.terminate()
        patience = time.monotonic() + _TERMINATION_SECONDS
        while any(process.poll() is None for process in self._running.values()):
            if time.monotonic() > patience:
                for process in self._running.values():
                    process.kill()
            time.sleep(_POLL_SECONDS / 4)
        if self.launcher is not None:
            self.launcher.close()
        for name in self._running:
            shutil.rmtree(partial_folder(self.stages, name), ignore_errors=True)
        self._running.clear()
