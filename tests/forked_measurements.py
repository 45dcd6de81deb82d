"""Measurements in forked processes: a fresh interpreter imports everything once and forks a process for each call.

``python tests/forked_measurements.py`` is that interpreter: it reads one JSON request a line and answers with one.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

LARGE = "model.layers.9.mlp.up_proj.weight"


def perform_with_little_memory(beyond: int, task: Any, *rest: Any) -> Any:
    """What a worker does with a task, unless it is the large one: then with so many bytes beyond what is in use."""
    from geopd.engine.executor import perform_task

    if task.origin.tensor != LARGE:
        return perform_task(task, *rest)
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + beyond, before[1]))
    try:
        return perform_task(task, *rest)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class ForkedMeasurements:
    """Started with the first request; ``geopd`` runs the command line, or what of it is left before it is killed."""

    def __enter__(self) -> ForkedMeasurements:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def geopd(self, *arguments: object, **request: Any) -> dict[str, Any]:
        """``code`` (negative: the signal that ended it), ``out``, ``err`` and ``seconds``.

        ``kill_after``: seconds until SIGKILL. ``limits``: by resource name (``FSIZE``: bytes of a file).
        ``without_privileges``: files' modes bind root too. ``meanwhile``: another command line, run while this one
        holds its folder; its answer is under ``other``.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request["argv"] = [str(argument) for argument in arguments]
        request["meanwhile"] = [str(argument) for argument in request.get("meanwhile", [])]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def _drop_capabilities() -> None:
    """Root without its capabilities is bound by files' modes as everybody is (capset of version 3, all sets empty)."""
    header, empty = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, empty) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _child(request: dict[str, Any], out: int, err: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    if request.get("without_privileges"):
        _drop_capabilities()
    for name, limit in request.get("limits", {}).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    from geopd.cli import main

    sys.argv = ["geopd", *request["argv"]]
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    files = [os.memfd_create(name) for name in ("out", "err")]
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(request, *files)
    other = None
    if request.get("meanwhile"):
        lock = Path(request["argv"][request["argv"].index("--out") + 1]) / ".lock"
        while not (lock.is_file() and lock.stat().st_size):
            time.sleep(0.001)
        os.kill(child, signal.SIGSTOP)
        other = _run({"argv": request["meanwhile"]})
        os.kill(child, signal.SIGCONT)
    if (delay := request.get("kill_after")) is not None:
        while (
            time.monotonic() - started < delay
            and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    texts = []
    for file in files:
        os.lseek(file, 0, os.SEEK_SET)
        with os.fdopen(file, encoding="utf-8") as stream:
            texts.append(stream.read())
    seconds = time.monotonic() - started
    return {
        "code": os.waitstatus_to_exitcode(status),
        "out": texts[0],
        "err": texts[1],
        "seconds": seconds,
        "other": other,
    }


def _serve() -> None:
    # everything is imported here, and nothing used: libraries with threads of their own do not survive a fork
    import geopd.cli
    import geopd.engine.preflight
    import geopd.results.task_log  # noqa: F401

    for line in sys.stdin:
        answer = _run(json.loads(line))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
