"""The report's tables as plain data: headline, claims, coverage and provenance, ready for the template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from geopd.report.drawing import Subject, commonest, main_benchmark
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
    """One line per run at its last step: value and Gaussian null of each headline metric, and accuracy."""
    summary = {line["run"]: line for line in summarise(subject.results).iter_rows(named=True)}
    scores, score_label = _scores(subject.results)
    lines = []
    for run, style in subject.styles.items():
        if run not in summary:
            continue
        line = summary[run] | {"rotation": rotation(summary[run])}
        cells = [{"value": _show(metric, line.get(metric)), "null": _null(metric, line)} for metric, _ in HEADLINE]
        lines.append(
            {
                "run": run,
                "paradigm": style.paradigm,
                "colour": style.colour,
                "origin": _origin(line["origin"]),
                "step": "–" if line["step"] is None else str(line["step"]),
                "matrices": line["matrices"],
                "cells": cells,
                "score": scores.get(run, "–"),
                "left_out": _left_out(subject.results, line),
            }
        )
    reference = [
        {"run": f"Qwen3-8B {p.upper()}", "cells": [REFERENCE[metric][p] for metric, _ in HEADLINE], "paradigm": p}
        for p in ("sft", "opd", "rlvr")
    ]
    origins = {(line["origin"]) for line in lines}
    return {
        "columns": [label for _, label in HEADLINE],
        "lines": lines,
        "reference": reference,
        "score_label": score_label,
        "origins": len(origins),
    }


def _origin(path: str | None) -> str:
    """A checkpoint's folder, with its run's where it is only a step."""
    parts = Path(path or "–").parts
    return "/".join(parts[-2:] if parts[-1][-1].isdigit() else parts[-1:])


def _share(explained: float | None) -> str:
    """A share of the contrast; outside 0 to 1 digits say nothing: the null has more than all of it, or the opposite."""
    if explained is None:
        return "–"
    return "over 100%" if explained > 1 else "none" if explained < 0 else f"{100 * explained:.0f}%"


def _left_out(results: Results, line: dict[str, Any]) -> str:
    parts = [
        f"{line[s]} {s} value{'' if line[s] == 1 else 's'}" for s in ("undefined", "unresolved", "failed") if line[s]
    ]
    if parts:
        mine = rows_of(results).filter(pl.col("run") == line["run"])
        parts[-1] += f" (most often: {commonest(mine)})"
    about = results.manifest.get("coverage", {}).get(line["run"], {})
    if failed := len(about.get("failed", [])):
        parts.append(f"{failed} {'matrix' if failed == 1 else 'matrices'} that could not be measured")
    return ", ".join(parts)


def _show(metric: str, value: float | None) -> str:
    return f"{value:.3g}°" if metric == "rotation" and value is not None else format_value(metric, value)


def _null(metric: str, line: dict[str, Any]) -> str:
    value = rotation(line, "_null_gaussian") if metric == "rotation" else line.get(f"{metric}_null_gaussian")
    return "" if value is None else f"null {_show(metric, value)}"


def _scores(results: Results) -> tuple[dict[str, str], str]:
    """Each run's last score on one benchmark, with the half-width of its 95% interval."""
    if (kind := main_benchmark(results.evaluations)) is None:
        return {}, ""
    benchmark, decoding = kind
    chosen = results.evaluations.filter((pl.col("benchmark") == benchmark) & (pl.col("decoding") == decoding))
    last = chosen.sort("step").group_by("run", maintain_order=True).last()
    texts = {
        line["run"]: f"{100 * line['value']:.1f} %" + (f" ± {196 * line['se']:.1f}" if line["se"] is not None else "")
        for line in last.iter_rows(named=True)
    }
    return texts, f"accuracy ({benchmark}, {decoding})"


def claims_table(results: Results) -> dict[str, Any]:
    """``claims.json`` with its numbers written out for the page, and what all its reasons have in common."""
    statements = [s for claim in results.claims for c in claim["comparisons"] for s in c["statements"]]
    reasons = [s["reason"] for s in statements if s["verdict"] == "unresolved"]
    common = max(sorted(set(filter(None, reasons))), key=reasons.count, default="")
    return {
        "lines": [
            claim | {"comparisons": [c | {"numbers": _numbers(c), "parts": _parts(c)} for c in claim["comparisons"]]}
            for claim in results.claims
        ],
        "common_reason": common,
        "nothing": all(claim["shows_here"] == "not measured" for claim in results.claims),
    }


def _numbers(comparison: dict[str, Any]) -> list[dict[str, str]]:
    """One line per role: each run's number and, where there is one, its null's."""
    metric = str(comparison["quantity"]).split(" (")[0].replace(" ", "_").replace("visible_density", "update_sparsity")
    metric = "rotation" if metric.startswith("mean_rotation") else metric
    measured, nulls = comparison["measured"], comparison["null_measured"]
    lines = []
    for role in ("sft", "opd", "rlvr"):
        runs = [run for run in comparison["runs"].get(role, []) if run in measured]
        if not runs:
            continue
        shown = [
            f"{v['first']:.3g} → {v['last']:.3g}" if isinstance(v := measured[run], dict) else _show(metric, v)
            for run in runs
        ]
        null = ", ".join(dict.fromkeys(_show(metric, nulls[run]) for run in runs if run in nulls))
        name = runs[0] if len(runs) == 1 else f"{role.upper()}, {len(runs)} seeds"
        lines.append({"run": name, "value": ", ".join(shown), "null": f"null {null}" if null else ""})
    return lines


def _parts(comparison: dict[str, Any]) -> list[dict[str, str]]:
    """A claim's statements with their estimates, intervals and nulls written out."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    return [
        {
            "text": s["text"] + (f" (± {s['margin']:.2g})" if s["margin"] is not None else ""),
            "estimate": number(s["estimate"]),
            "interval": "–" if s["interval"] is None else " to ".join(map(number, s["interval"])),
            "null": number(s["null_estimate"]),
            "share": _share(s["explained_share"]),
        }
        for s in comparison["statements"]
    ]


def moved_most(subject: Subject, n: int = 10) -> list[dict[str, Any]]:
    """For each run the matrices that moved most, with the numbers of the headline written out."""
    tables = []
    for run in subject.styles:
        lines = movers(subject.results, run, n).to_dicts() if run in set(subject.results.measurements["run"]) else []
        if not lines:
            continue
        by = lines[0]["ranked_by"]
        rows = [
            [
                line["matrix"],
                format_value(by, line["value"]),
                format_value("update_sparsity", line["update_sparsity"]),
                " / ".join(_show("rotation", line[f"rotation_{side}_mean_deg"]) for side in ("left", "right")),
                format_value("stable_rank", line["stable_rank"]),
            ]
            for line in lines
        ]
        tables.append({"run": run, "by": metric_of(by).label, "rows": rows})
    return tables


def coverage(results: Results) -> list[dict[str, Any]]:
    """What was matched, skipped and failed, run by run, with reasons; long lists cut."""
    lines = []
    for run, about in sorted(results.manifest.get("coverage", {}).items()):
        alone = pl.col("other_run").is_null()
        mine = results.measurements.filter((pl.col("run") == run) & alone & (pl.col("status") != "ok"))
        reasons = (
            mine.group_by("metric", "status", "note")
            .len()
            .sort("len", "metric", "note", descending=[True, False, False])
        )
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
