"""From finished parts to the folder's tables and manifest."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import polars as pl

from geopd.engine.pairs import flat, nested, still_current
from geopd.results import EVALUATIONS, RUNS, Store

SCHEMA_VERSION = 1


def fold(
    store: Store,
    settings: dict[str, Any],
    covered: Mapping[str, dict[str, Any]],
    before: dict[str, Any] | None,
    entries: dict[str, dict[str, Any]],
    parts: dict[str, dict[str, str]],
    pairs: Mapping[tuple[str, str, str], str],
    estimated: dict[str, Any] | None,
    device: str,
) -> set[str]:
    """Write the tables and the manifest of everything in the folder: ``before``'s runs and this plan's.

    ``settings``: the options. ``covered``, ``entries`` and ``parts`` are this plan's coverage, inputs and part names by
    run label, ``pairs`` its part names by (run, other run, matrix). ``estimated``: what this call expected of its
    tasks, None where it had none. Returns the names of the parts about two runs that no longer hold.
    """
    before = before or {"inputs": {}, "parts": {}, "pair_parts": {}, "coverage": {}, "timing": {}}
    inputs = {**before["inputs"], **entries}
    all_parts = {**before["parts"], **parts}
    old_pairs = before.get("pair_parts", {})
    all_pairs = {**still_current(old_pairs, all_parts), **pairs}
    records = {label: {name: store.record(key) for name, key in parts[label].items()} for label in parts}
    timing = {
        label: {name: {k: record[k] for k in ("seconds", "method", "threads")} for name, record in found.items()}
        for label, found in records.items()
    }
    coverage = {label: _coverage(found, records[label]) for label, found in covered.items()}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "geopd_version": version("geopd"),
        "versions": {name: version(name) for name in ("torch", "numpy", "scipy", "polars", "safetensors")}
        | {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()},
        "device": device,
        "threads": max((record["threads"] for found in timing.values() for record in found.values()), default=1),
        "settings": settings,
        "inputs": inputs,
        "coverage": {**before["coverage"], **coverage},
        "parts": all_parts,
        "pair_parts": nested(all_pairs),
        "timing": {**before["timing"], **timing},
        "estimate": before.get("estimate") if estimated is None else estimated,
    }
    tables = {"runs": _runs_table(inputs), "evaluations": _evaluations_table(inputs)}
    keys = [key for run in all_parts.values() for key in run.values()]
    store.fold([*keys, *all_pairs.values()], tables, manifest)
    return {key for _, key in flat(old_pairs)} - set(all_pairs.values())


def _coverage(covered: dict[str, Any], records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    known = {item["matrix"] for item in covered["failed"]}
    measured = [
        {"matrix": name, "reason": record["failure"]}
        for name, record in sorted(records.items())
        if record["failure"] and name not in known
    ]
    return covered | {"failed": covered["failed"] + measured}


def _runs_table(inputs: dict[str, dict[str, Any]]) -> pl.DataFrame:
    rows = [
        {"run": label, **{k: entry[k] for k in RUNS if k in entry}, "tags": json.dumps(entry["tags"], sort_keys=True)}
        for label, entry in sorted(inputs.items())
    ]
    return pl.DataFrame(rows, schema=RUNS)


def _evaluations_table(inputs: dict[str, dict[str, Any]]) -> pl.DataFrame:
    rows = [{"run": label, **item} for label, entry in sorted(inputs.items()) for item in entry["evaluations"]]
    return pl.DataFrame(rows, schema=EVALUATIONS).sort("run", "benchmark", "decoding", "step")
