"""Reading a results folder: the tables as polars frames, the manifest, the vectors. Never imports torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from geopd.results.schema import EVALUATIONS, MEASUREMENTS, NULLS, RUNS
from geopd.results.store import VECTORS


@dataclass(frozen=True)
class Results:
    """A results folder, read: the tidy tables, the manifest, claims and the miniature's notes where they are there."""

    root: Path
    measurements: pl.DataFrame
    nulls: pl.DataFrame
    runs: pl.DataFrame
    evaluations: pl.DataFrame
    manifest: dict[str, Any]

    @cached_property
    def claims(self) -> list[dict[str, Any]]:
        """The verdicts of ``claims.json``; empty where none were decided."""
        return _json_list(self.root / "claims.json")

    @cached_property
    def notes(self) -> list[dict[str, Any]]:
        """Texts that whoever made the runs wants in the report (``notes.json``)."""
        return _json_list(self.root / "notes.json")

    @cached_property
    def gradients(self) -> list[dict[str, Any]]:
        """Gradient covariances at the anchor (``gradients.json``), one line per seed and matrix; often none.

        Keys: ``seed matrix layer module prompts samples``, the effective ranks ``opd`` and ``rlvr``, their
        ``log_ratio`` with its ``se``, the same on unit-norm gradients with ``_unit`` behind the name, and ``note``,
        the reason where a value is null.
        """
        return _json_list(self.root / "gradients.json")

    @cached_property
    def costs(self) -> list[dict[str, Any]]:
        """What each training stage took (``costs.json``); often none.

        Keys: ``stage paradigm seed tags steps train_seconds evaluate_seconds core_seconds peak_memory_bytes tokens``.
        """
        return _json_list(self.root / "costs.json")

    def vectors(self, run: str, matrix: str) -> dict[str, np.ndarray]:
        """Angle and singular-value vectors of one matrix of one run; empty where none were stored.

        Keys: ``sigma_origin``, and for each step ``{step}/sigma``, ``{step}/angles_left`` and ``{step}/angles_right``
        (degrees, ascending). The step of a run without step numbers is written ``final``.
        """
        name = self.manifest["parts"].get(run, {}).get(matrix)
        path = self.root / VECTORS / f"{name}.npz"
        if name is None or not path.exists():
            return {}
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}


def read_results(folder: str | Path) -> Results:
    """Read a results folder.

    Raises:
        ValueError: if the folder is no results folder, or a table lacks a column this version reads.
    """
    root = Path(folder)
    manifest = root / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{root}: no manifest.json here; name a folder written by `geopd measure --out`")
    frames = {}
    for name, schema in (
        ("measurements", MEASUREMENTS),
        ("nulls", NULLS),
        ("runs", RUNS),
        ("evaluations", EVALUATIONS),
    ):
        path = root / f"{name}.parquet"
        if not path.is_file():
            raise ValueError(f"{path}: missing; run `geopd measure --out {root}` again to fold the tables")
        frame = pl.read_parquet(path)
        if missing := [column for column in schema if column not in frame.columns]:
            raise ValueError(f"{path}: lacks the column(s) {', '.join(missing)}; measure again with this version")
        frames[name] = frame
    return Results(root=root, manifest=json.loads(manifest.read_text(encoding="utf-8")), **frames)


def _json_list(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    value: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return value
