"""The log of a results folder: one JSON line for every task that ended, in the order in which they did. No torch.

Keys of a line: ``time`` (UTC), ``matrix``, ``module``, ``layer``, ``rows``, ``cols``, ``runs``, ``steps`` (checkpoints
measured) and ``kept_steps`` (those kept from before), ``pairs``, ``status`` (ok, failed), ``reason``, ``method``,
``seconds`` in the worker, ``cpu_seconds`` of the processor (of all threads), ``expected_seconds``, ``bytes`` of its
inputs, ``peak_bytes`` of the worker's own memory (mapped files apart) and ``expected_bytes``, ``worker``, ``threads``,
``device``, ``attempts``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
_SPENT = ("seconds", "cpu_seconds")


def append_line(root: Path, line: dict[str, Any]) -> None:
    """Add one line, whole or, where the process is killed at it, cut short: then the next one starts anew."""
    path = root / LOG
    text = json.dumps(line, sort_keys=True, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())


def read_log(root: str | Path) -> list[dict[str, Any]]:
    """The lines of a folder's log in order, empty where there is none; a line cut short is left out."""
    path = Path(root) / LOG
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def timing(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Where a folder's seconds went, over all calls that measured into it.

    ``seconds`` and ``cpu_seconds`` of workers, ``tasks``, ``failed``, ``workers_lost``; ``modules`` and ``matrices``
    with theirs, the longest first; ``expected_seconds`` and ``factor`` = seconds / expected of the tasks that were
    done, and the same of the largest worker's memory: ``expected_bytes``, ``peak_bytes``, ``bytes_factor``. Null where
    nothing tells.
    """
    modules: dict[str, dict[str, Any]] = {}
    matrices: dict[str, dict[str, Any]] = {}
    for line in lines:
        module = modules.setdefault(
            line["module"], {"module": line["module"], "tasks": 0, **dict.fromkeys(_SPENT, 0.0)}
        )
        module["tasks"] += 1
        matrix = matrices.setdefault(line["matrix"], dict.fromkeys(_SPENT, 0.0))
        matrix |= {key: line[key] for key in ("matrix", "rows", "cols", "method", "status", "peak_bytes")}
        for key in _SPENT:
            module[key] += line[key]
            matrix[key] += line[key]
    done = [line for line in lines if line["status"] == "ok"]
    seconds, expected = (sum(line[key] for line in done) for key in ("seconds", "expected_seconds"))
    peak, expected_peak = (
        max((line[key] for line in done if line["peak_bytes"]), default=None)
        for key in ("peak_bytes", "expected_bytes")
    )
    return {
        "tasks": len(lines),
        "failed": sum(line["status"] != "ok" for line in lines),
        "workers_lost": sum(line["attempts"] - 1 for line in lines),
        **{key: sum(line[key] for line in lines) for key in _SPENT},
        "modules": sorted(modules.values(), key=lambda item: -item["seconds"]),
        "matrices": sorted(matrices.values(), key=lambda item: -item["seconds"]),
        "expected_seconds": expected if done else None,
        "factor": seconds / expected if expected else None,
        "expected_bytes": expected_peak,
        "peak_bytes": peak,
        "bytes_factor": peak / expected_peak if peak and expected_peak else None,
    }
