"""A results folder as one process holds it: nobody else writes there until it is let go, whatever ends the process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from geopd.results.store import PARTS, VECTORS

LOCK = ".lock"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Make the folder where it is not there, and hold it. The lock goes with the process, so a dead one holds nothing.

    Half-written files that an earlier process left behind are removed.

    Raises:
        ValueError: if the folder cannot be written, or another process holds it; the text says which.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{out}: {_holder(out)} is measuring into it; wait until it is done, or name another --out"
            ) from error
        lock.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
        lock.flush()
        for folder in (out, out / PARTS, out / VECTORS):
            for abandoned in folder.glob(".*.tmp"):
                abandoned.unlink(missing_ok=True)
        yield


def manifest_of(out: Path) -> dict[str, Any] | None:
    """The manifest of what has been folded into a results folder; None where nothing has.

    Raises:
        ValueError: if it cannot be read.
    """
    path = out / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable ({error}); remove the folder or name another") from error
    return manifest


def _holder(out: Path) -> str:
    found: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # only to tell who it is
        found = json.loads((out / LOCK).read_text(encoding="utf-8"))
    if not found:
        return "another process"
    return f"process {found.get('pid')} on {found.get('host')} (since {found.get('since')})"
