"""The report's tables as plain data: headline, coverage and provenance, ready for the template."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl

from geopd.report.accuracy_figures import margin
from geopd.report.drawing import Subject, commonest, main_benchmark
from geopd.report.groups import Group, half_width
from geopd.results import METRICS, Results
from geopd.results.metrics import format_value, metric_of
from geopd.results.reference import REFERENCE
from geopd.results.summary import movers, rotation, rows_of, summarise

HEADLINE = (
    ("update_sparsity", "sparsity"),
    ("rotation", "rotation"),
    ("spectral_shift", "NSS"),
    ("principal_overlap", "principal overlap"),
    ("low_magnitude_overlap", "low-magnitude overlap"),
    ("stable_rank", "stable rank"),
    ("update_norm", "update norm"),
)
MAX_ITEMS = 40
"""Longer lists of skipped or failed matrices are cut, and say how many were."""


def headline(subject: Subject) -> dict[str, Any]:
    """One line per group at its last step: value, interval and Gaussian null of each headline metric, and accuracy.

    ``lines`` are the baselines (all runs where nothing is tagged), ``others`` the tagged groups; ``origins`` counts the
    weights that runs start from, ``own_origins`` the seeds where no two of them share one (else 0).
    """
    summary = {line["run"]: line for line in summarise(subject.results).iter_rows(named=True)}
    scores, score_label = _scores(subject)
    lines = {
        name: _line(subject, group, [summary[run] for run in group.runs if run in summary], scores)
        for name, group in subject.groups.items()
        if any(run in summary for run in group.runs)
    }
    reference = [
        {"run": f"Qwen3-8B {p.upper()}", "cells": [REFERENCE[metric][p] for metric, _ in HEADLINE], "paradigm": p}
        for p in ("sft", "opd", "rlvr")
    ]
    first = subject.baselines.groups
    origins = _origins(subject)
    shown = [line for name, line in lines.items() if name in first]
    return {
        "columns": [label for _, label in HEADLINE],
        "lines": shown,
        "others": [line for name, line in lines.items() if name not in first],
        "reference": reference,
        "score_label": score_label,
        "runs": sum(len(group.runs) for group in subject.groups.values()),
        "seeds": max((len(group.runs) for group in subject.groups.values()), default=1),
        "origins": len({digest for digests in origins.values() for digest in digests}),
        "own_origins": len(origins) if sum(map(len, origins.values())) == len(set().union(*origins.values())) else 0,
    }


def _line(subject: Subject, group: Group, found: list[dict[str, Any]], scores: dict[str, str]) -> dict[str, Any]:
    style = subject.styles[group.name]
    found = [line | {"rotation": rotation(line)} for line in found]
    steps = [line["step"] for line in found if line["step"] is not None]
    tags = ", ".join(f"{k} {v}" for k, v in group.tags.items())
    origin = _origin(found[0]["origin"])
    if len(group.runs) > 1:  # each seed has its own; the folder's name without the seed stands for all
        origin = re.sub(r"-s\d+(?=/|$)", "", origin)
    return {
        "run": group.name,
        "paradigm": group.paradigm,
        "about": tags or f"{group.paradigm}, from {origin}",
        "colour": style.colour,
        "origin": origin,
        "step": str(max(steps)) if steps else "–",
        "seeds": len(found),
        "cells": [_cell(metric, found) for metric, _ in HEADLINE],
        "score": scores.get(group.name, "–"),
        "left_out": _left_out(subject.results, found),
    }


def _cell(metric: str, found: list[dict[str, Any]]) -> dict[str, str]:
    values = [line[metric] for line in found if line.get(metric) is not None]
    nulls = [null for line in found if (null := _null(metric, line)) is not None]
    half = half_width(values)
    return {
        "value": show(metric, fmean(values) if values else None),
        "half": "" if half is None else show_half(metric, half),
        "null": f"null {show(metric, fmean(nulls))}" if nulls else "",
    }


def _origins(subject: Subject) -> dict[int | None, set[str]]:
    """Digests of the weights that the runs of each seed start from; the path where there is no digest."""
    found: dict[int | None, set[str]] = {}
    for line in subject.results.runs.iter_rows(named=True):
        found.setdefault(line["seed"], set()).add(line["origin_digest"] or line["origin"] or "–")
    return found


def _origin(path: str | None) -> str:
    """A checkpoint's folder, with its run's where it is only a step."""
    parts = Path(path or "–").parts
    return "/".join(parts[-2:] if parts[-1][-1].isdigit() else parts[-1:])


def _left_out(results: Results, found: list[dict[str, Any]]) -> str:
    counts = {s: sum(line[s] for line in found) for s in ("undefined", "unresolved", "failed")}
    parts = [f"{n} {s} value{'' if n == 1 else 's'}" for s, n in counts.items() if n]
    runs = [line["run"] for line in found]
    if parts:
        mine = rows_of(results).filter(pl.col("run").is_in(runs))
        parts[-1] += f" (most often: {commonest(mine)})"
    failed = sum(len(results.manifest.get("coverage", {}).get(run, {}).get("failed", [])) for run in runs)
    if failed:
        parts.append(f"{failed} {'matrix' if failed == 1 else 'matrices'} that could not be measured")
    return ", ".join(parts)


def show(metric: str, value: float | None) -> str:
    """A value for human eyes; ``rotation`` in degrees."""
    return f"{value:.3g}°" if metric == "rotation" and value is not None else format_value(metric, value)


def show_half(metric: str, half: float) -> str:
    """Half an interval for human eyes: of a share in percent with two digits, however small it is."""
    return f"± {100 * half:.2g} %" if metric_of(metric).unit.startswith("share of") else f"± {show(metric, half)}"


def _null(metric: str, line: dict[str, Any]) -> float | None:
    return rotation(line, "_null_gaussian") if metric == "rotation" else line.get(f"{metric}_null_gaussian")


def _scores(subject: Subject) -> tuple[dict[str, str], str]:
    """Each group's last score on one benchmark, with the half-width of its 95% interval."""
    if (kind := main_benchmark(subject.results.evaluations)) is None:
        return {}, ""
    table = subject.accuracies
    chosen = table.filter((pl.col("benchmark") == kind[0]) & (pl.col("decoding") == kind[1]))
    last = chosen.filter(pl.col("step").eq_missing(pl.col("step").max().over("run")))
    texts = {
        line["run"]: f"{100 * line['value']:.1f} %" + (f" ± {100 * half:.1f}" if (half := margin(line)) else "")
        for line in subject.fold(last).iter_rows(named=True)
    }
    return texts, f"accuracy ({kind[0]}, {kind[1]})"


def moved_most(subject: Subject, n: int = 10) -> list[dict[str, Any]]:
    """For the first run of each baseline the matrices that moved most, with the headline's numbers written out."""
    tables = []
    results = subject.baselines.results
    measured = set(results.measurements["run"].unique())
    for run in [group.runs[0] for group in subject.baselines.groups.values()]:
        lines = movers(results, run, n).to_dicts() if run in measured else []
        if not lines:
            continue
        by = lines[0]["ranked_by"]
        rows = [
            [
                line["matrix"],
                format_value(by, line["value"]),
                format_value("update_sparsity", line["update_sparsity"]),
                " / ".join(show("rotation", line[f"rotation_{side}_mean_deg"]) for side in ("left", "right")),
                format_value("stable_rank", line["stable_rank"]),
            ]
            for line in lines
        ]
        tables.append({"run": run, "by": metric_of(by).label, "rows": rows})
    return tables


def coverage(results: Results) -> list[dict[str, Any]]:
    """What was matched, skipped and failed, run by run, with reasons; long lists cut."""
    lines = []
    lost = results.measurements.filter(pl.col("other_run").is_null() & (pl.col("status") != "ok"))
    counted = (
        lost.group_by("run", "metric", "status", "note")
        .len()
        .sort("len", "metric", "note", descending=[True, False, False])
    )
    for run, about in sorted(results.manifest.get("coverage", {}).items()):
        reasons = counted.filter(pl.col("run") == run)
        lines.append(
            {
                "run": run,
                "matched": about.get("matched", 0),
                "skipped": _cut([f"{s['name']}: {s['reason']}" for s in about.get("skipped", [])]),
                "failed": _cut([f"{f['matrix']}: {f['reason']}" for f in about.get("failed", [])]),
                "warnings": _cut([str(w) for w in about.get("warnings", [])]),
                "without_value": _cut(
                    [
                        f"{metric_of(r['metric']).label}: {r['len']} {r['status']} ({r['note']})"
                        for r in reasons.iter_rows(named=True)
                    ]
                ),
            }
        )
    return lines


def _cut(items: list[str]) -> list[str]:
    rest = len(items) - MAX_ITEMS
    return items if rest <= 0 else [*items[:MAX_ITEMS], f"… and {rest} more (all in manifest.json or the tables)"]


def provenance(results: Results) -> dict[str, Any]:
    """Settings, versions, inputs with digests and the time the measurement took."""
    manifest = results.manifest
    runs = [
        {
            "run": line["run"],
            "path": line["path"] or "–",
            "origin": line["origin"] or "–",
            "origin_digest": (line["origin_digest"] or "–")[:16],
            "digests": ", ".join(d[:16] for d in _cut(list(line["digests"] or []))),
        }
        for line in results.runs.sort("run").iter_rows(named=True)
    ]
    seconds = sum(t.get("seconds", 0.0) for run in manifest.get("timing", {}).values() for t in run.values())
    return {
        "settings": sorted((k, _text(v)) for k, v in manifest.get("settings", {}).items()),
        "versions": sorted((k, _text(v)) for k, v in manifest.get("versions", {}).items()),
        "geopd": manifest.get("geopd_version", "–"),
        "runs": runs,
        "seconds": f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}",
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def glossary(results: Results) -> list[dict[str, str]]:
    """Plain-language lines of the metrics this folder has."""
    found = set(results.measurements["metric"])
    return [
        {"label": m.label, "name": m.name, "unit": m.unit, "gloss": m.gloss, "source": m.source}
        for m in METRICS.values()
        if m.name in found
    ]
