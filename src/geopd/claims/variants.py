"""Whether OPD's geometry stays what it is with another teacher, student or domain."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log, sqrt
from statistics import stdev

from geopd.claims.comparisons import Comparison
from geopd.claims.endpoints import Endpoint, Numbers, mean_of, only
from geopd.claims.orders import BAND
from geopd.claims.roles import casts, origins_redrawn, tags_of
from geopd.claims.verdicts import Statement
from geopd.results import Results

VARIANT_BAND = log(1.11)
"""Equivalence margin of the other metrics, declared beforehand: within 11% as a log ratio.

The paper calls a table of variants stable whose sparsities lie from 48.6 to 57.1% around 51.6%, 10.7% at the most.
"""

_METRICS: tuple[tuple[str, str, float], ...] = (
    ("update_sparsity", "sparsity", VARIANT_BAND),
    ("spectral_shift", "spectral shift", VARIANT_BAND),
    ("stable_rank_denoised", "stable rank", BAND),
    ("principal_overlap", "principal overlap", VARIANT_BAND),
    ("low_magnitude_overlap", "low-magnitude overlap", VARIANT_BAND),
)


def stable_over_variants(results: Results) -> list[Comparison]:
    """Each metric of every OPD run tagged ``variant`` is within a declared share of the baseline OPD's.

    Seeds that both have are paired. A variant with a single seed has ``sqrt(2) * sd`` of the baselines' logs for its
    spread: variants may have another student or domain and so share nothing with their baseline.
    """
    variants: dict[str, dict[int, str]] = {}
    measured = set(results.measurements["run"])
    for row in results.runs.sort("run").iter_rows(named=True):
        tags = tags_of(row)
        if row["paradigm"] == "opd" and row["run"] in measured and set(tags) == {"variant"}:
            variants.setdefault(tags["variant"], {}).setdefault(row["seed"] or 0, row["run"])
    cast = casts(results)[0].of(("opd",))
    baseline = {} if cast.tagged else {seed: runs["opd"] for seed, runs in cast.seeds.items()}
    if not variants:
        return [_comparison(results, "variants", {}, baseline)]
    found = {name: _comparison(results, name, runs, baseline) for name, runs in sorted(variants.items())}
    return [_every(found), *found.values()] if len(found) > 1 else list(found.values())


def _every(found: dict[str, Comparison]) -> Comparison:
    """All statements of all variants: the claim is about every one of them."""
    first = next(iter(found.values()))
    parts = [replace(s, text=f"{_words(name)}: {s.text}") for name, c in found.items() for s in c.statements]
    return replace(
        first,
        id="summary",
        label="OPD with every variant beside the baseline OPD",
        statements=parts,
        runs={"opd": first.runs["opd"]} | {name: c.runs["variant"] for name, c in found.items()},
        values={run: value for c in found.values() for run, value in c.values.items()},
        seeds=max(c.seeds for c in found.values()),
        redrawn=all(c.redrawn for c in found.values()),
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _comparison(results: Results, name: str, variant: dict[int, str], baseline: dict[int, str]) -> Comparison:
    runs = [*baseline.values(), *variant.values()]
    read = [(text, margin, _numbers(results, metric, runs)) for metric, text, margin in _METRICS]
    missing = None if baseline else "no OPD run without tags, the yardstick of the variants"
    if not variant:
        missing = "no OPD run is tagged `variant`"
    return Comparison(
        id=f"variant_{name}" if variant else name,
        label=f"OPD with {_words(name)} beside the baseline OPD" if variant else "OPD variants",
        quantity="sparsity, spectral shift, stable rank and mask overlaps at the end",
        statements=[_within(text, margin, numbers, variant, baseline) for text, margin, numbers in read],
        runs={"opd": list(baseline.values()), "variant": list(variant.values())},
        values={run: {text: n.values[run] for text, _, n in read if run in n.values} for run in runs},
        null=next((n.null for _, _, n in read if n.null), None),
        matched="end",
        seeds=len(variant),
        redrawn=origins_redrawn(results, variant.values()),
        missing=missing,
    )


def _numbers(results: Results, metric: str, runs: list[str]) -> Numbers:
    found = _endpoint(metric)
    numbers = found.read(only(results, runs, found.metrics))
    if metric == "stable_rank_denoised" and not numbers.values:  # spectra of another version, without the estimate
        found = _endpoint("stable_rank")
        numbers = found.read(only(results, runs, found.metrics))
    return numbers


def _endpoint(metric: str) -> Endpoint:
    return mean_of(metric, alpha=0.3 if "overlap" in metric else None)


def _within(text: str, margin: float, numbers: Numbers, variant: dict[int, str], baseline: dict[int, str]) -> Statement:
    reason = None
    if text == "stable rank":
        shaky = not numbers.quantity.startswith("stable rank denoised")
        shaky = shaky or not numbers.unresolved.isdisjoint([*variant.values(), *baseline.values()])
        reason = "the stable rank without rounding noise is not resolved for every matrix" if shaky else None
    values = _log_ratios(numbers.values, variant, baseline)
    return Statement(
        f"{text} within {100 * (exp(margin) - 1):.0f}% of the baseline",
        values,
        _log_ratios(numbers.nulls, variant, baseline),
        margin=margin,
        reason=reason if values else None,
        yardstick=_spread(numbers.values, baseline) if len(values) == 1 else None,
    )


def _spread(values: dict[str, float], baseline: dict[int, str]) -> tuple[float, int] | None:
    logs = [log(values[run]) for run in baseline.values() if values.get(run, 0) > 0]
    return (sqrt(2) * stdev(logs), len(logs) - 1) if len(logs) > 1 else None


def _log_ratios(values: dict[str, float], variant: dict[int, str], baseline: dict[int, str]) -> dict[int, float]:
    """Log of variant over baseline by seed: paired where seeds have both, else over the baseline's mean log."""
    logs = [{s: log(values[run]) for s, run in runs.items() if values.get(run, 0) > 0} for runs in (variant, baseline)]
    mine, theirs = logs
    common = sorted(mine.keys() & theirs.keys())
    if common:
        return {seed: mine[seed] - theirs[seed] for seed in common}
    mean = sum(theirs.values()) / len(theirs) if theirs else None
    return {} if mean is None else {seed: value - mean for seed, value in mine.items()}
