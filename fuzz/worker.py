"""One process of a fuzzing run: a range of cases, its place told in a file, the outcomes on standard output."""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path

from fuzz.trial import Trial, guard, keep


def main(target: str, session: str, start: str, end: str, scratch: str, findings: str) -> None:
    """Run the cases from ``start`` to ``end``; keep the files of up to 20 findings."""
    trial = Trial(target, int(session), Path(scratch) / "files")
    place = Path(scratch) / "progress"
    place.write_bytes(b" " * 20)
    with place.open("r+b") as file:
        told = mmap.mmap(file.fileno(), 20)
    guard()
    for case in range(int(start), int(end)):
        told[:] = str(case).encode().rjust(20)
        if trial.run(case) is not None and len(trial.tally.findings) <= 20:
            keep(trial, case, Path(findings))
    print(json.dumps({"outcomes": trial.tally.outcomes, "findings": trial.tally.findings}))


if __name__ == "__main__":
    main(*sys.argv[1:])
