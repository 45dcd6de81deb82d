"""Run a study's stages in the order their parents allow, two processes at a time, and resume where a run stopped.

A stage is written in ``stages/.<name>.partial`` and renamed to ``stages/<name>`` behind its marker ``finished.json``.
The marker's key digests the stage's settings, the seed, and the keys and weights of its parents: the same key is not
run twice, another key (or none) runs the stage again and, through the keys, whatever depends on it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from geopd.study.stages import Scale, Stage, partial_folder, stage_folder, stage_key

__all__ = ["Schedule", "StageFailedError", "StageStatus", "read_marker"]

_POLL_SECONDS = 0.2
_TERMINATION_SECONDS = 5.0
_STAGE_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # The study is a CPU study: a GPU would be slower at these sizes, and several would be refused by the trainer.
    "CUDA_VISIBLE_DEVICES": "",
}


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


def stage_command(folder: Path) -> list[str]:
    """The process that runs the stage described in a folder."""
    return [sys.executable, "-m", "geopd.study.stage", str(folder), str(os.getpid())]


@dataclass
class Schedule:
    """The stages of a scale under one output folder.

    Args:
        scale: what to run.
        stages: the folder of stage folders.
        seed: of the study.
        workers: stage processes at a time, one thread each.
        report: called with all statuses a few times a second.
        command: the process of a stage, given its folder.
    """

    scale: Scale
    stages: Path
    seed: int
    workers: int = 2
    report: Callable[[dict[str, StageStatus]], None] | None = None
    command: Callable[[Path], list[str]] = stage_command
    statuses: dict[str, StageStatus] = field(init=False)
    _running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.statuses = {stage.name: StageStatus() for stage in self.scale.stages}

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
        for stage in sorted(waiting, key=self._work_behind, reverse=True):
            if len(self._running) >= self.workers:
                return
            if all(self.statuses[parent.stage].share >= 1.0 for parent in stage.parents):
                key = stage_key(stage, self.seed, [self._parent_identity(stage, i) for i in range(len(stage.parents))])
                marker = read_marker(self.stages, stage.name)
                if marker is not None and marker["key"] == key:
                    self.statuses[stage.name] = StageStatus(1.0, "resumed")
                else:
                    self._start(stage, key)

    def _work_behind(self, stage: Stage) -> float:
        """Expected core-seconds of the longest chain of stages that begins with this one."""
        children = [s for s in self.scale.stages if any(parent.stage == stage.name for parent in s.parents)]
        return stage.cost + max((self._work_behind(child) for child in children), default=0.0)

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
        parents = {"start": stage.start, "teacher": stage.teacher}
        description = {
            "stage": stage.settings(),
            "seed": self.seed,
            "key": key,
            # Relative to the stage's folder, whose siblings the parents are: the study can be moved as a whole.
            "parents": {role: f"../{p.stage}/checkpoint-{p.step}" for role, p in parents.items() if p is not None},
        }
        (folder / "stage.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        log = (folder / "log.txt").open("wb")
        process = subprocess.Popen(
            self.command(folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_STAGE_ENVIRONMENT},
            # Its own session, so that Ctrl-C reaches the scheduler alone, which then ends its stages in order.
            start_new_session=True,
        )
        self._running[stage.name] = (process, log)
        self.statuses[stage.name] = StageStatus(0.0, "running", "starting")

    def _collect(self) -> None:
        for name, (process, log) in list(self._running.items()):
            code = process.poll()
            if code is None:
                self._read_progress(name)
                continue
            log.close()
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
        for process, _ in self._running.values():
            process.terminate()
        for process, log in self._running.values():
            try:
                process.wait(timeout=_TERMINATION_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()
        for name in self._running:
            shutil.rmtree(partial_folder(self.stages, name), ignore_errors=True)
        self._running.clear()
