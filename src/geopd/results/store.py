"""The one store of a results folder: part files, committed atomically, folded into the tables.

A part holds everything measured for one matrix of one run: its rows (measurements and nulls), its vectors' file name
and a record of how it was made. Its name is the digest of its inputs, settings and step list, so a part that exists
is a part that is finished and current: resuming, accumulating runs and repeating a measurement are all this store.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from geopd.results.schema import KEY, MEASUREMENTS, NULLS

PARTS = "parts"
VECTORS = "vectors"
_RECORD_KEY = "geopd"
_PART = pl.Schema([*MEASUREMENTS.items(), *((k, v) for k, v in NULLS.items() if k not in MEASUREMENTS)])


def digest_of(value: Any) -> str:
    """Digest of a JSON-able value, independent of key order (blake2b, 128 bits, hexadecimal)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Part:
    """One finished matrix of one run: table rows, vectors for the figures and the record of how it was made."""

    key: str
    measurements: list[dict[str, Any]]
    nulls: list[dict[str, Any]]
    vectors: dict[str, np.ndarray]
    record: dict[str, Any]


def write_atomically(path: Path, write: Any) -> None:
    """Write through a temporary sibling and rename, so that a reader sees the whole file or none.

    ``write`` receives the temporary path. The data is on disk before the name is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, sorted and indented; NaN and infinities are refused."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class Store:
    """A results folder as it is written: ``has``, ``commit``, then ``fold``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / PARTS).mkdir(parents=True, exist_ok=True)
        (root / VECTORS).mkdir(exist_ok=True)

    def _part(self, key: str) -> Path:
        return self.root / PARTS / f"{key}.parquet"

    def has(self, key: str) -> bool:
        """Whether the part of this name is finished."""
        return self._part(key).exists()

    def record(self, key: str) -> dict[str, Any]:
        """How a finished part was made."""
        record: dict[str, Any] = json.loads(pl.read_parquet_metadata(self._part(key))[_RECORD_KEY])
        return record

    def commit(self, part: Part) -> None:
        """Make a part visible: its vectors first, its rows and record last, each by rename."""
        if part.vectors:
            vectors = self.root / VECTORS / f"{part.key}.npz"

            def save(temporary: Path) -> None:
                with temporary.open("wb") as file:
                    np.savez(file, **part.vectors)  # type: ignore[arg-type]

            write_atomically(vectors, save)
        frame = pl.concat(
            [pl.DataFrame(part.measurements, schema=MEASUREMENTS), pl.DataFrame(part.nulls, schema=NULLS)],
            how="diagonal",
        ).select(_PART.names())
        metadata = {_RECORD_KEY: json.dumps(part.record, sort_keys=True, allow_nan=False)}
        write_atomically(self._part(part.key), lambda path: frame.write_parquet(path, metadata=metadata))

    def discard(self, keys: Iterable[str]) -> None:
        """Forget parts: their rows first, so that a half-done discard leaves no part without vectors."""
        for key in keys:
            self._part(key).unlink(missing_ok=True)
            (self.root / VECTORS / f"{key}.npz").unlink(missing_ok=True)

    @contextmanager
    def folding(self) -> Iterator[None]:
        """Hold the folder while its manifest is read and its tables are rewritten; parts may be committed meanwhile."""
        folder = os.open(self.root / PARTS, os.O_RDONLY)  # the folder itself is locked, so that no file is left
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def fold(self, keys: Iterable[str], tables: Mapping[str, pl.DataFrame], manifest: Mapping[str, Any]) -> None:
        """Write the folder's tables from the named parts; order is a function of content alone."""
        paths = [self._part(key) for key in sorted(keys)]
        rows = pl.read_parquet(paths, schema=_PART) if paths else pl.DataFrame(schema=_PART)
        order = list(KEY)
        measurements = rows.filter(pl.col("null").is_null()).select(MEASUREMENTS.names()).sort(order, nulls_last=False)
        nulls = rows.filter(pl.col("null").is_not_null()).select(NULLS.names()).sort([*order, "null"])
        for name, frame in {"measurements": measurements, "nulls": nulls, **tables}.items():
            write_atomically(self.root / f"{name}.parquet", frame.write_parquet)
        write_json(self.root / "manifest.json", dict(manifest))
