"""Fuzzing at length: damaged checkpoints by the hundred thousand, in processes that may die without ending the run.

``python -m fuzz.run --cases 1000000`` from the repository's root; exit code 1 when anything was found.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from fuzz.seeds import SEEDS

CHUNK = 20_000  # cases a process does before a fresh one takes over
_SILENCE = 600.0  # seconds without progress, its start included, after which a process counts as hung


def main() -> int:
    """Share the cases among the seeds, run them, print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.run", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="in all, shared evenly among the targets")
    parser.add_argument("--session", type=int, default=0, help="another number, other cases")
    parser.add_argument("--targets", nargs="*", choices=sorted(SEEDS), default=sorted(SEEDS))
    parser.add_argument("--findings", type=Path, default=Path("runs/fuzz"), help="folder for what was found")
    asked = parser.parse_args()
    asked.findings.mkdir(parents=True, exist_ok=True)
    share, began, found = -(-asked.cases // len(asked.targets)), time.monotonic(), 0
    for target in asked.targets:
        outcomes, findings = _target(target, asked.session, share, asked.findings)
        found += len(findings)
        counts = ", ".join(f"{n:,} {what}" for what, n in sorted(outcomes.items()))
        print(f"{target}: {share:,} cases: {counts}", flush=True)
        for what, n in Counter(re.sub(r"\d+|'[^']*'", "#", text)[:150] for _, text in findings).most_common(20):
            example = next(case for case, text in findings if re.sub(r"\d+|'[^']*'", "#", text)[:150] == what)
            print(f"  found {n}x, first in case {example}: {what}", flush=True)
    print(f"{share * len(asked.targets):,} cases in {time.monotonic() - began:,.0f} s, {found} findings")
    return 1 if found else 0


def _target(target: str, session: int, cases: int, folder: Path) -> tuple[Counter[str], list[tuple[int, str]]]:
    outcomes: Counter[str] = Counter()
    findings: list[tuple[int, str]] = []
    start = 0
    while start < cases:
        end = min(start + CHUNK, cases)
        with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
            start = _chunk(target, session, start, end, folder, Path(scratch), outcomes, findings)
    return outcomes, findings


def _chunk(
    target: str,
    session: int,
    start: int,
    end: int,
    folder: Path,
    scratch: Path,
    outcomes: Counter[str],
    findings: list[tuple[int, str]],
) -> int:
    """Run cases in a process of their own; the first case that is left."""
    progress = scratch / "progress"
    progress.write_text(str(start))
    (scratch / "files").mkdir()
    command = [
        sys.executable,
        "-m",
        "fuzz.worker",
        target,
        str(session),
        str(start),
        str(end),
        str(scratch),
        str(folder),
    ]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    last, since = start, time.monotonic()
    while True:
        try:
            out, err = worker.communicate(timeout=5)
            break
        except subprocess.TimeoutExpired:
            now = int(progress.read_text() or last)
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > _SILENCE:
                worker.kill()
    if worker.returncode == 0:
        told = json.loads(out)
        outcomes.update(told["outcomes"])
        findings += [(case, text) for case, text in told["findings"]]
        return end
    reached = int(progress.read_text() or start)
    outcomes["wrong"] += 1
    findings.append((reached, f"the process ended with code {worker.returncode}: {err.strip()[-200:]}"))
    return reached + 1


if __name__ == "__main__":
    sys.exit(main())
