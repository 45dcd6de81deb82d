"""Results folders made up without an engine: the shape of real ones, numbers from a simple Gaussian picture.

Each run is described by the size of its update; sparsity, overlaps and rotation follow from it roughly as they do in
trained models, with scatter over matrices, so that orderings and trajectories come out as asked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from geopd.results import (
    EVALUATIONS,
    RUNS,
    Identity,
    Measurement,
    Null,
    Part,
    Status,
    Store,
    digest_of,
    row,
    setting,
    write_json,
)

SHAPES = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (384, 128),
    "mlp.up_proj": (384, 128),
    "mlp.down_proj": (128, 384),
}
OUTSIDE = {"embed_tokens": ("embedding", 24, 128), "lm_head": ("head", 24, 128), "norm": ("norm", 128, 1)}


def every_matrix(layers: int) -> tuple[str, ...]:
    """Names of all matrices of a made-up model."""
    return (*(f"layers.{layer}.{name}" for layer in range(layers) for name in SHAPES), *OUTSIDE)


@dataclass(frozen=True)
class Run:
    """How a made-up run moves: update size at the end, stable rank and Hill from start to end, how early it locks."""

    name: str
    paradigm: str
    size: float
    stable_rank: tuple[float, float] = (4.0, 4.0)
    hill: tuple[float, float] = (2.5, 2.5)
    lock: float = 0.3
    steps: tuple[int | None, ...] = (20, 40, 60, 80, 100, 120)
    origin: str = "anchor"
    seed: int = 0
    accuracy: tuple[float, float] = (0.26, 0.42)
    failed: tuple[str, ...] = ()


STUDY = (
    Run("sft", "sft", 0.16, (5, 14), (2.0, 4.2), 0.35, origin="base", accuracy=(0.12, 0.26)),
    Run("opd", "opd", 0.016, (4.2, 4.4), (2.34, 2.93), 0.75, accuracy=(0.26, 0.42), failed=("layers.2.mlp.up_proj",)),
    Run("rlvr", "rlvr", 0.006, (7, 4.6), (3.2, 2.4), 0.3, accuracy=(0.26, 0.41)),
    Run("sft_continued", "sft", 0.05, (5, 11), (2.1, 3.8), 0.4, accuracy=(0.26, 0.51)),
)


@dataclass
class Folder:
    """A results folder being made up."""

    root: Path
    runs: tuple[Run, ...] = STUDY
    layers: int = 4
    entrywise_only: bool = False
    evaluated: bool = True
    parts: dict[str, dict[str, str]] = field(default_factory=dict)

    def write(self) -> Path:
        store = Store(self.root)
        for run in self.runs:
            self.parts[run.name] = {}
            for matrix, layer, module, shape in self._matrices():
                if matrix in run.failed:
                    continue
                part = _part(run, matrix, layer, module, shape, self.entrywise_only)
                store.commit(part)
                self.parts[run.name][matrix] = part.key
        keys = [key for parts in self.parts.values() for key in parts.values()]
        store.fold(keys, {"runs": self._runs(), "evaluations": self._evaluations()}, self._manifest())
        return self.root

    def _matrices(self) -> list[tuple[str, int | None, str, tuple[int, int]]]:
        inner = [
            (f"layers.{layer}.{name}", layer, name.split(".")[-1], shape)
            for layer in range(self.layers)
            for name, shape in SHAPES.items()
        ]
        return inner + [(name, None, module, (rows, cols)) for name, (module, rows, cols) in OUTSIDE.items()]

    def _runs(self) -> pl.DataFrame:
        return pl.DataFrame(
            [
                {
                    "run": r.name,
                    "paradigm": r.paradigm,
                    "seed": r.seed,
                    "origin": f"models/{r.origin}",
                    "origin_digest": digest_of([r.origin, r.seed]),
                    "path": f"models/{r.name}",
                    "steps": [s for s in r.steps if s is not None],
                    "digests": [digest_of([r.name, s]) for s in r.steps],
                    "tags": None,
                }
                for r in self.runs
            ],
            schema=RUNS,
        )

    def _evaluations(self) -> pl.DataFrame:
        rows: list[dict[str, Any]] = []
        for run in self.runs if self.evaluated else ():
            for i, step in enumerate(run.steps):
                progress = (i + 1) / len(run.steps)
                for decoding, lift, n in (("greedy", 0.3, 512), ("avg@8", 0.0, 2000)):
                    value = lift + run.accuracy[0] + (run.accuracy[1] - run.accuracy[0]) * progress**0.7
                    se = sqrt(value * (1 - value) / n)
                    rows.append(
                        dict(zip(EVALUATIONS, (run.name, step, "held_out", decoding, n, value, se), strict=True))
                    )
        return pl.DataFrame(rows, schema=EVALUATIONS)

    def _manifest(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "geopd_version": "0.1.0",
            "versions": {"python": "3.11", "torch": "2.13.0", "numpy": "2.4.6"},
            "settings": {"alpha": 0.5, "eta": 0.001, "rotation_k": 16, "matrices": ["all"]},
            "inputs": {
                r.name: {"path": f"models/{r.name}", "origin": f"models/{r.origin}", "steps": list(r.steps)}
                for r in self.runs
            },
            "coverage": {
                r.name: {
                    "matched": len(self.parts[r.name]),
                    "skipped": [{"name": "rotary.inv_freq", "reason": "a buffer, not a weight"}],
                    "failed": [{"matrix": m, "reason": "the tensor holds <NaN> values"} for m in r.failed],
                    "warnings": ["origin is fp32, checkpoints are bf16"] if r.name == "opd" else [],
                }
                for r in self.runs
            },
            "parts": self.parts,
            "timing": {
                run: {m: {"seconds": 0.25, "method": "float64 svd"} for m in parts} for run, parts in self.parts.items()
            },
        }


def _part(run: Run, matrix: str, layer: int | None, module: str, shape: tuple[int, int], entrywise: bool) -> Part:
    rng = np.random.default_rng(int(digest_of([run.name, run.seed, matrix])[:8], 16))
    measured: list[dict[str, Any]] = []
    nulls: list[dict[str, Any]] = []
    vectors: dict[str, np.ndarray] = {}
    scatter = float(rng.lognormal(0, 0.25)) * (1.3 if "mlp" in matrix else 1.0)
    for i, step in enumerate(run.steps):
        progress = (i + 1) / len(run.steps)
        at = Identity(run.name, step, matrix, layer, module, *shape)
        size = run.size * scatter * sqrt(progress)
        items = _entrywise(size, matrix, layer is not None)
        if layer is not None and not entrywise:
            items += _spectral(run, size, progress, i, shape, matrix, rng)
            vectors |= _vectors(size, step, shape, rng)
        measured += [row(at, item) for item in items if isinstance(item, Measurement)]
        nulls += [row(at, item) for item in items if isinstance(item, Null)]
    return Part(digest_of([run.name, run.seed, matrix]), measured, nulls, vectors, {"seconds": 0.25})


def _entrywise(size: float, matrix: str, inner: bool) -> list[Measurement | Null]:
    density = 1 - 0.0017 / (0.0017 + size)
    items: list[Measurement | Null] = []

    def add(
        metric: str, value: float | None, note: str | None = None, *, gaussian: float | None, **settings: Any
    ) -> None:
        default = settings.get("alpha", 0.5) == 0.5
        status = Status.OK if value is not None else Status.UNDEFINED
        text = setting(**settings)
        items.append(Measurement(metric, text, value, 0.0, status, "exact count", note, default))
        if gaussian is not None:
            items.append(Null(metric, text, "gaussian", gaussian, None, 0, "closed form", default))
        if gaussian is not None and "overlap" in metric:
            items.append(Null(metric, text, "random_mask", settings["alpha"], 0.0, 0, "exact", default))
        if metric == "principal_overlap":
            items.append(Null(metric, text, "permuted", 0.98 * float(gaussian or 0.5), None, 0, "exact", default))

    add("update_sparsity", 1 - density, eta=0.001, view="bf16", gaussian=1 - 0.97 * density if inner else None)
    if not inner:
        return items
    for alpha in (0.5, 0.3):
        low = alpha + (1 - alpha) * (1 - density) * 0.8
        principal = alpha * (1 - 0.6 * (1 - density))
        if size < 0.0055:  # the smallest updates of a run show no visible change here
            note = "no visible change at eta=0.001"
            add("low_magnitude_overlap", None, note, gaussian=None, alpha=alpha, eta=0.001, view="bf16")
            continue
        add("low_magnitude_overlap", low, gaussian=low * 1.02, alpha=alpha, eta=0.001, view="bf16")
        add("principal_overlap", principal, gaussian=principal * 1.03, alpha=alpha, eta=0.001, rank=2, view="bf16")
    return items


def _spectral(
    run: Run, size: float, progress: float, i: int, shape: tuple[int, int], matrix: str, rng: np.random.Generator
) -> list[Measurement | Null]:
    m, n = shape
    k = min(m, n) // 8
    items: list[Measurement | Null] = []

    def add(metric: str, value: float, null: float | None = None, *, default: bool = True, **settings: Any) -> None:
        unresolved = metric == "stable_rank" and run.name == "rlvr" and i == 0 and "k_proj" in matrix
        status, note = (Status.UNRESOLVED, "rounding noise dominates") if unresolved else (Status.OK, None)
        text = setting(**settings, view="native")
        items.append(Measurement(metric, text, value, 1e-9, status, "float64 svd", note, default))
        if null is not None:
            items.append(Null(metric, text, "gaussian", null, None, 0, "closed form", default))

    norm0 = 0.02 * sqrt(m * n)
    wobble = float(rng.lognormal(0, 0.05))
    for side in ("left", "right"):
        for summary, factor in (("mean", 50), ("median", 40), ("max", 110)):
            add(f"rotation_{side}_{summary}_deg", factor * size * wobble, k=k)
        share = k / (m if side == "left" else n)
        add(f"principal_energy_{side}", min(0.95, 3.4 * share * wobble), share, k=k)
    add("spectral_shift", 0.15 * size * wobble)
    add("update_norm", size * norm0)
    add("relative_update_norm", size)
    rank = run.stable_rank[0] + (run.stable_rank[1] - run.stable_rank[0]) * progress
    add("update_operator_norm", size * norm0 / sqrt(rank * wobble))
    add("stable_rank", rank * wobble, m * n / (sqrt(m) + sqrt(n)) ** 2)
    add("hill_tail", (run.hill[0] + (run.hill[1] - run.hill[0]) * progress) * wobble, k=16)
    for big_k in (16, 4):
        similarity = min(1.0, run.lock + (1 - run.lock) * progress)
        add("subspace_similarity", similarity, big_k / n, default=big_k == 16, k=big_k)
        add("increment_similarity", run.lock * wobble, big_k / n, default=big_k == 16, k=big_k)
    return items


def _vectors(size: float, step: int | None, shape: tuple[int, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    p = min(shape)
    label = "final" if step is None else str(step)
    sigma = 0.5 * np.exp(-3 * np.arange(p) / p)
    angles = np.sort(50 * size * np.exp(rng.normal(0, 0.6, p // 8)))
    return {
        "sigma_origin": sigma,
        f"{label}/sigma": sigma * (1 + 0.2 * size * np.linspace(-1, 2, p)),
        f"{label}/angles_left": angles,
        f"{label}/angles_right": angles * 1.2,
    }


def write_notes(root: Path) -> None:
    """Notes as the miniature leaves them, with markup that must stay text."""
    text = "One seed; **nothing** speaks of 8B.\n\n| stage | seconds |\n|---|---|\n| base | 240 |\n\n<script>x</script>"
    write_json(root / "notes.json", [{"title": "How these runs were made", "text": text}])
