"""Tables of a whole study: sparsity by module, variants, projections, controls, learning rates, costs, runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import polars as pl

from geopd.report.accuracy_figures import margin
from geopd.report.control_figures import METRICS, baseline_of, mixtures, paths
from geopd.report.drawing import Subject, main_benchmark
from geopd.report.groups import Group
from geopd.report.leaks import leak_cell, leak_of
from geopd.report.map_figures import module_order
from geopd.report.projection_figures import PARADIGMS, arms, benchmark_order, end_scores, update_norms
from geopd.report.tables import show_half
from geopd.report.variant_figures import variant_groups
from geopd.results.metrics import format_value, metric_of
from geopd.results.summary import aggregate, aggregate_nulls, rows_of

_NOTHING = ("–", "")
_SEED = re.compile(r"[-_ ]?s(?:eed)?[-_ ]?\d+$")
_COSTS = ("steps", "train_seconds", "evaluate_seconds", "core_seconds", "tokens")
_ENDS = (
    "relative_update_norm",
    "update_sparsity",
    "low_magnitude_overlap",
    "principal_overlap",
    "rotation_right_mean_deg",
    "spectral_shift",
    "stable_rank",
)


@dataclass(frozen=True)
class Table:
    """One table of the page. A cell is a text, or a text and a smaller one below it."""

    name: str
    title: str
    note: str
    head: tuple[str, ...]
    rows: list[list[tuple[str, str]]]
    place: tuple[str, str] | None = None
    """Where the page says more: an anchor and the text of the link that ends the note."""


def study_tables(subject: Subject) -> list[Table]:
    """All tables that the folder has something for; none for a folder without tags, seeds and costs."""
    whole = subject.seeded or any(group.tags for group in subject.groups.values())
    found: list[Table | None] = []
    if whole:
        found += [_sparsity(subject.baselines), _runs(subject)]
    rates = [g for g in subject.groups.values() if "learning_rate" in g.tags]
    ladder = [g for p in ("opd", "rlvr") if rates and (g := baseline_of(subject, p))] + rates
    found += [
        _ends(subject, "variants", "Variants of distillation (counterpart of Tables 1 and 6)", variant_groups(subject)),
        _projections(subject),
        _controls(subject),
        _ends(subject, "rates", "Other learning rates", sorted(ladder, key=lambda g: (g.paradigm, bool(g.tags)))),
        _costs(subject),
    ]
    return [table for table in found if table is not None and table.rows]


def _with_half(metric: str, line: dict[str, Any] | None) -> tuple[str, str]:
    if line is None:
        return _NOTHING
    half = "" if line["half"] is None else show_half(metric, line["half"])
    return format_value(metric, line["value"]), half


def _label(group: Group) -> tuple[str, str]:
    tags = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in group.tags.items() if k != "start")
    seeds = f"{len(group.runs)} seeds" if len(group.runs) > 1 else "one seed"
    return (group.name if not tags else f"{group.paradigm}: {tags}"), seeds


def _sparsity(subject: Subject) -> Table:
    rows = rows_of(subject.results, "update_sparsity")
    nulls = rows_of(subject.results, "update_sparsity", table="nulls").filter(pl.col("null") == "gaussian")
    modules = module_order(rows)
    overall = aggregate(rows).with_columns(module=pl.lit("overall"))
    lines = pl.concat([overall, aggregate(rows, ["module"])], how="diagonal").filter(pl.col("value").is_not_null())
    found = {(li["run"], li["module"]): li for li in subject.fold(lines, ["module"]).iter_rows(named=True)}
    null = subject.fold(aggregate_nulls(rows, nulls), ["null"], "null_mean")
    null_values = dict(null.select("run", "null_mean").iter_rows())
    return Table(
        "table_sparsity",
        "Update sparsity by module (counterpart of Table 1)",
        "Share of weights left unchanged in bf16, mean over seeds with half a 95% t interval. The null is a Gaussian "
        "update of the same size, over all modules.",
        ("run", "overall", "Gaussian null", *modules),
        [
            [
                _label(group),
                _with_half("update_sparsity", found.get((name, "overall"))),
                (format_value("update_sparsity", null_values.get(name)), ""),
                *(_with_half("update_sparsity", found.get((name, module))) for module in modules),
            ]
            for name, group in subject.groups.items()
            if (name, "overall") in found
        ],
    )


def _ends(subject: Subject, name: str, title: str, groups: Sequence[Group]) -> Table | None:
    """Endpoint metrics and accuracy, one line per group."""
    if not groups:
        return None
    some = subject.only(list(groups))
    rows = rows_of(some.results, *_ENDS)
    folded = some.fold(aggregate(rows).filter(pl.col("value").is_not_null()), ["metric"])
    found = {(line["run"], line["metric"]): line for line in folded.iter_rows(named=True)}
    metrics = [m for m in _ENDS if any(key[1] == m for key in found)]
    scores, label = _end_scores(some)
    return Table(
        f"table_{name}",
        title,
        "Each run at its end, a mean over matrices; ± is half a 95% interval, over seeds where there are several, for "
        "the accuracy of a single seed over problems.",
        ("run", *(metric_of(m).label for m in metrics), label),
        [
            [_label(g), *(_with_half(m, found.get((g.name, m))) for m in metrics), scores.get(g.name, _NOTHING)]
            for g in groups
        ],
    )


def _end_scores(subject: Subject) -> tuple[dict[str, tuple[str, str]], str]:
    if (kind := main_benchmark(subject.accuracies)) is None:
        return {}, "accuracy"
    table = subject.accuracies.filter((pl.col("benchmark") == kind[0]) & (pl.col("decoding") == kind[1]))
    last = table.filter(pl.col("step").eq_missing(pl.col("step").max().over("run")))
    lines = subject.fold(last).iter_rows(named=True)
    return {line["run"]: _percent(line) for line in lines}, f"accuracy ({kind[0]}, {kind[1]})"


def _percent(line: dict[str, Any]) -> tuple[str, str]:
    half = margin(line)
    return f"{100 * line['value']:.1f} %", "" if half is None else f"± {100 * half:.1f}"


def _projections(subject: Subject) -> Table | None:
    found = [(p.upper(), arm, group) for p in PARADIGMS for arm, group in arms(subject, p)]
    scores = end_scores(subject)
    if not found or scores.is_empty():
        return None
    benchmarks = benchmark_order(scores)
    lines = {(line["run"], line["benchmark"]): _percent(line) for line in scores.iter_rows(named=True)}
    norms = update_norms(subject)
    return Table(
        "table_projections",
        "Training inside a channel, benchmarks at the end (Figures 6 and 8 in numbers)",
        "avg@4 accuracy; ± is half a 95% interval, over seeds where there are several, else over problems. Arms are "
        "matched in K, mode, learning rate and steps, not in the length of their steps: see their relative update "
        "norm. Leak: share of the energy of the increment since the projection began that lies outside the subspace, "
        "of all matrices together and of the worst matrix of any seed; an adapter's is rounding.",
        ("arm", "leak", "relative update norm", *(b.replace("_", " ") for b in benchmarks)),
        [
            [
                (f"{paradigm} {arm.label}", _label(group)[1]),
                leak_cell(leak_of(subject.results, group)),
                _with_half("relative_update_norm", norms.get(group.name)),
                *(lines.get((group.name, b), ("–", "")) for b in benchmarks),
            ]
            for paradigm, arm, group in found
        ],
    )


def _controls(subject: Subject) -> Table | None:
    mixed = [g for n in (False, True) for _, g in mixtures(subject, normalised=n)]
    others = [g for g in subject.groups.values() if {"token_selection", "rollouts"} & set(g.tags)]
    if not mixed and not others:
        return None
    first = [g for p in ("opd", "rlvr") if (g := baseline_of(subject, p))]
    groups = list(dict.fromkeys(g.name for g in [*first, *others, *mixed]))
    means = paths(subject)
    by = {key: part.sort("step") for key, part in means.partition_by("run", "metric", as_dict=True).items()}
    scores, label = _end_scores(subject)
    rows = []
    for group in (subject.groups[name] for name in groups):
        cells = [_path_cell(metric, by.get((group.name, metric))) for metric in METRICS]
        rows.append([_label(group), *cells, scores.get(group.name, _NOTHING)])
    return Table(
        "table_controls",
        "Controls: first to last checkpoint (Figures 7 and 9 in numbers)",
        "± is half a 95% t interval over seeds at the last checkpoint.",
        ("run", *(metric_of(m).label for m in METRICS), label),
        rows,
    )


def _path_cell(metric: str, path: pl.DataFrame | None) -> tuple[str, str]:
    if path is None or path.is_empty():
        return _NOTHING
    last = path.row(-1, named=True)
    text = f"{format_value(metric, path['value'][0])} → {format_value(metric, last['value'])}"
    return text, _with_half(metric, last)[1]


def _start(row: dict[str, Any]) -> tuple[int | None, str | None]:
    """The weights that a run starts from, within its seed."""
    return row["seed"], row["origin_digest"] or row["origin"]


def _runs(subject: Subject) -> Table:
    rows = {row["run"]: row for row in subject.results.runs.to_dicts()}
    online = [run for g in subject.baselines.groups.values() if g.paradigm in ("opd", "rlvr") for run in g.runs]
    anchors = {_start(rows[run]) for run in online if run in rows}
    lines = []
    for group in subject.groups.values():
        mine = [rows[run] for run in group.runs if run in rows]
        seeds = ", ".join(str(row["seed"]) for row in mine if row["seed"] is not None)
        steps = ", ".join(map(str, mine[0]["steps"] or [])) if mine else ""
        shared = bool(mine) and {_start(row) for row in mine} <= anchors
        origin = "origin of the on-policy baselines" if shared else "its own origin"
        lines.append([_label(group), (group.paradigm, ""), (seeds or "–", ""), (steps or "–", ""), (origin, "")])
    told = bool(subject.results.notes)
    return Table(
        "table_runs",
        "Runs, their seeds, checkpoints and origins",
        "A tag names everything in which a run differs from its baseline; lines without tags are baselines. A seed "
        "redraws the origins too."
        + (" What the stages were trained with (counterpart of Tables 2 to 5) is told under" if told else ""),
        ("run", "paradigm", "seeds", "checkpoints at step", "starts from"),
        lines,
        ("notes", "About these runs") if told else None,
    )


def _costs(subject: Subject) -> Table | None:
    """Costs per stage, folded over seeds: means per run, and the sum of core seconds."""
    folded: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in subject.results.costs:
        key = (_SEED.sub("", row["stage"]), json.dumps(row.get("tags") or {}, sort_keys=True))
        folded.setdefault(key, []).append(row)

    def mean(rows: list[dict[str, Any]], key: str, scale: float = 1.0) -> str:
        values = [row[key] * scale for row in rows if row.get(key) is not None]
        return f"{fmean(values):,.0f}" if values else "–"

    lines = [
        [
            (stage, ", ".join(f"{k} {v}" for k, v in json.loads(tags).items())),
            (str(len(rows)), ""),
            *((mean(rows, key), "") for key in _COSTS),
            (mean(rows, "peak_memory_bytes", 2**-20), ""),
        ]
        for (stage, tags), rows in folded.items()
    ]
    total = sum(row.get("core_seconds") or 0.0 for row in subject.results.costs)
    tokens = sum(row.get("tokens") or 0 for row in subject.results.costs)
    return Table(
        "table_costs",
        "What it cost",
        f"Means per run of a stage. Together {total:,.0f} core seconds ({total / 3600:.1f} core hours) and "
        f"{tokens:,.0f} tokens trained on.",
        ("stage", "runs", "steps", "training, s", "evaluation, s", "core seconds", "tokens", "peak memory, MiB"),
        lines,
    )
