"""Stages in processes that share one start: a server imports the training libraries once and forks for every stage.

Importing torch, transformers and TRL takes about six seconds of a core, which a study of a hundred stages would pay a
hundred times. ``python -m geopd.study.stage_server`` reads the folder of a stage per line, forks, and writes a line of
JSON when a stage begins and when it ends. Nothing has computed in it when it forks, so no thread pool is lost. It ends,
and with it what it forked, when its input closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Launcher", "StageProcess", "StageServer"]

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # The study is a CPU study: a GPU would be slower at these sizes, and several would be refused by the trainer.
    "CUDA_VISIBLE_DEVICES": "",
}
_REAP_SECONDS = 0.1
_END_SECONDS = 10.0
LOST = -signal.SIGKILL
"""Exit status of a stage whose server is gone."""


class StageProcess(Protocol):
    """A stage under way; ``subprocess.Popen`` is one."""

    def poll(self) -> int | None:
        """The exit status; None while it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""


class Launcher(Protocol):
    """What starts stages."""

    def start(self, folder: Path) -> StageProcess:
        """Run the stage described in a folder, with its output in the folder's ``log.txt``."""

    def close(self) -> None:
        """End whatever is left."""


class StageServer:
    """The launcher of real stages; the server starts with the first of them.

    Args:
        log: file for what the server itself has to say.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[str] | None = None
        self._codes: dict[str, int] = {}
        self._pids: dict[str, int] = {}
        self._unread = ""

    def start(self, folder: Path) -> ForkedStage:
        """See :class:`Launcher`."""
        if self._process is None:
            with self.log.open("w") as said:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "geopd.study.stage_server"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    text=True,
                    env={**os.environ, **_ENVIRONMENT},
                    # Its own session, so that Ctrl-C reaches the scheduler alone, which then ends its stages in order.
                    start_new_session=True,
                )
        name = str(folder.absolute())
        self._codes.pop(name, None)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the server died: poll tells
            self._process.stdin.write(name + "\n")
            self._process.stdin.flush()
        return ForkedStage(self, name)

    def code(self, name: str) -> int | None:
        """The exit status of a stage; None while it runs."""
        assert self._process is not None
        gone = self._process.poll() is not None
        for line in self._lines():
            if "code" in line:
                self._codes[line["folder"]] = line["code"]
                self._pids.pop(line["folder"], None)
            else:
                self._pids[line["folder"]] = line["pid"]
        return self._codes.get(name, LOST if gone else None)

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a stage that runs."""
        if self.code(name) is None and name in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pids[name], number)

    def close(self) -> None:
        """See :class:`Launcher`."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None

    def _lines(self) -> Iterator[dict[str, Any]]:
        """What the server has said since the last look, without waiting."""
        assert self._process is not None
        assert self._process.stdout is not None
        source = self._process.stdout.fileno()
        while select.select([source], [], [], 0)[0]:
            found = os.read(source, 65536).decode()
            if not found:
                break
            self._unread += found
        *lines, self._unread = self._unread.split("\n")
        yield from map(json.loads, lines)


class ForkedStage:
    """A stage that a server forked; see :class:`StageProcess`."""

    def __init__(self, server: StageServer, name: str) -> None:
        self.server = server
        self.name = name

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self.server.code(self.name)

    def terminate(self) -> None:
        """Ask it to end."""
        self.server.send(self.name, signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.server.send(self.name, signal.SIGKILL)


def serve() -> None:
    """Fork a stage for every line of standard input until it closes, then end those that still run."""
    _import_training()
    running: dict[int, str] = {}
    unread, open_ = "", True
    while open_:
        if select.select([sys.stdin], [], [], _REAP_SECONDS)[0]:
            found = os.read(sys.stdin.fileno(), 65536).decode()
            open_ = bool(found)
            *folders, unread = (unread + found).split("\n")
            for folder in folders:
                running[pid := _fork(folder)] = folder
                _say({"folder": folder, "pid": pid})
        _reap(running)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _import_training() -> None:
    import torch
    import transformers.models.qwen3.modeling_qwen3
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    import geopd.study.stage
    import geopd.training.bases_of_runs
    import geopd.training.gradient_covariance
    import geopd.training.policy_divergence
    import geopd.training.run  # noqa: F401

    # One thread: two stages run at once, and sums in a fixed order make a repeat bit-identical.
    torch.set_num_threads(1)


def _fork(folder: str) -> int:
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        from geopd.study.stage import run_stage

        run_stage(Path(folder), server)
        status = 0
    except SystemExit as end:
        print(end, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reap(running: dict[int, str]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        _say({"folder": running.pop(pid), "code": os.waitstatus_to_exitcode(status)})


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    serve()
