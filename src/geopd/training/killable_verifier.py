"""A verifier in a process of its own, so that an answer which hangs it costs one score and not the training run.

Symbolic comparison has inputs that run for ever or fill the memory, often inside C code that no Python signal can stop.
math-verify's own time limits are SIGALRM handlers: they work in a main thread only and not inside such code. Here the
parent waits, then kills the worker, reaps it and starts another for the next item.

The worker is a plain child (``python -m geopd.training.killable_verifier``) rather than one of multiprocessing: it
imports neither torch nor the script that started training, so a script without a main guard is not run twice. It reads
``[answer, response]`` lines of JSON and writes ``{"score": ...}`` or ``{"fault": ...}`` lines.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable

__all__ = ["KillableVerifier", "VerifierFault"]

_START_SECONDS = 120.0
_MEMORY_BYTES = 8 << 30


class VerifierFault(RuntimeError):  # noqa: N818 - one item could not be judged; the verifier itself goes on
    """An item that was not judged.

    Args:
        message: what happened.
        kind: ``timeout``, ``ended`` (the worker died) or the name of the error that the verifier raised.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class KillableVerifier:
    """Scores (answer, response) pairs in a worker process, started at the first item and restarted when it ended.

    Not more than one item is under way; several threads may call. A process forked from this one starts its own worker.

    Args:
        target: ``module:function`` of (answer, response) -> float, imported by the worker.
        seconds: per item.

    Raises:
        ValueError: ``seconds`` is not positive.
    """

    def __init__(self, target: str, *, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds={seconds}: give an item a positive time")
        self.target, self.seconds = target, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._end: weakref.finalize[..., KillableVerifier] | None = None
        self._lock = threading.Lock()

    def score(self, answer: str, response: str) -> float:
        """The verifier's score of one item.

        Raises:
            VerifierFault: it took longer than ``seconds``, ended its process or raised; the next item is not affected.
            ValueError: the worker cannot be started.
        """
        with self._lock:
            process = self._running()
            line = json.dumps([answer, response]).encode() + b"\n"
            try:
                reply = _exchange(process, line, self.seconds)
            except TimeoutError:
                self._stop()
                raise VerifierFault(f"no score after {self.seconds:g} s; the worker was killed", "timeout") from None
            except (EOFError, OSError):
                code = self._stop()
                raise VerifierFault(f"the worker ended with code {code}", "ended") from None
        if "fault" in reply:
            raise VerifierFault(str(reply["fault"]), str(reply["kind"]))
        return float(str(reply["score"]))

    def close(self) -> None:
        """Kill and reap the worker; the next item starts another."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid():
            if self._process.poll() is None:
                return self._process
            self._stop()  # it died between two items, which is not the next one's fault
        command = [sys.executable, "-m", "geopd.training.killable_verifier", self.target, str(self.seconds)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # an interrupt from the keyboard is the parent's to handle
        )
        self._process, self._owner = process, os.getpid()
        self._end = weakref.finalize(self, _kill, process, self._owner)
        try:
            _exchange(process, b"", _START_SECONDS)
        except (TimeoutError, EOFError, OSError):
            code = self._stop()
            raise ValueError(
                f"the verifier {self.target} could not be started (code {code}): its message is above; run "
                f"`{' '.join(command[:3])} {self.target} 1` to see it again"
            ) from None
        return process

    def _stop(self) -> int | None:
        """Kill and reap; the exit code, negative for a signal."""
        process, self._process = self._process, None
        if process is None or self._end is None:
            return None
        self._end()
        return process.returncode


def _kill(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the parent must not end the parent's worker
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _exchange(process: subprocess.Popen[bytes], line: bytes, seconds: float) -> dict[str, object]:
    """Send a line and wait for one.

    Raises:
        TimeoutError: no line came in time.
        EOFError: the worker ended.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    if line:
        process.stdin.write(line)
        process.stdin.flush()
    deadline, received = time.monotonic() + seconds, b""
    while not received.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            raise TimeoutError
        part = os.read(process.stdout.fileno(), 1 << 16)
        if not part:
            process.wait()
            raise EOFError
        received += part
    reply: dict[str, object] = json.loads(received)
    return reply


def _serve(target: str, seconds: float) -> None:
    """The worker's loop; ends with its input."""
    # What the verifier prints goes to the error stream: the output carries the replies.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    _limit_memory()
    module, _, name = target.partition(":")
    verifier: Callable[[str, str], float] = getattr(importlib.import_module(module), name)
    logging.disable(logging.CRITICAL)  # math-verify warns that its own time limits are off
    replies.write(b'{"ready": true}\n')
    for line in sys.stdin.buffer:
        # The default action of this signal ends the process even inside C code, so that a worker whose parent was
        # killed does not compute on.
        signal.setitimer(signal.ITIMER_REAL, 2.0 * seconds + 1.0)
        try:
            reply: dict[str, object] = {"score": float(verifier(*json.loads(line)))}
        except Exception as error:  # whatever a verifier raises is that item's fault
            reply = {"fault": str(error)[:300], "kind": type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        replies.write(json.dumps(reply).encode() + b"\n")


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]))
