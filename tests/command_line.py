"""The command line as a user types it: in this process where possible, with what it printed and its exit code."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def complaint(self) -> str:
        """The one line that unusable input earns."""
        assert self.code == 2, self
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("geopd: ")
        assert "Traceback" not in self.err
        return lines[0]


def geopd(*arguments: object) -> Outcome:
    """Run ``geopd`` in this process."""
    from geopd.cli import main

    out, err = io.StringIO(), io.StringIO()
    code = 0
    argv = ["geopd", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return Outcome(code, out.getvalue(), err.getvalue())


def start_geopd(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start ``geopd`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from geopd.cli import main; main()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
