"""Where a data set lies: files, folders, saved ``datasets`` folders and hub names, each read into one Dataset."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

__all__ = ["read_dataset"]

_FILE_KINDS = (".jsonl", ".json", ".parquet")
_SPLIT_WORDS = ("train", "validation", "valid", "val", "dev", "test", "eval")
_ROWS_A_CHUNK = 10_000


class _WrittenFloat(float):
    """A JSON number that remembers how it is written: 2.50, or 1e3."""

    def __new__(cls, text: str) -> _WrittenFloat:
        made = super().__new__(cls, text)
        made.text = text
        return made

    text: str

    def __str__(self) -> str:
        return self.text


_KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
_KINDS[_WrittenFloat] = _KINDS[float]


def read_dataset(
    source: str | Path, *, split: str | None = None, subset: str | None = None, as_text: Sequence[str] = ()
) -> Dataset:
    """Rows of a file, a folder or a hub data set, as they are.

    Args:
        source: a ``.jsonl``, ``.json`` (a list of objects) or ``.parquet`` file; a folder of such files of one kind of
            row; a folder written by ``save_to_disk``; or a hub name ``owner/name``.
        split: which part of a folder or hub data set; None is ``train`` where there are several. A folder whose files
            are called after splits gives the files that start with it. A file has no splits.
        subset: the configuration of a hub data set.
        as_text: places (``column`` or ``column.field``) whose JSON numbers become texts as they are written: one type
            for the column would make 3 beside 2.5 into 3.0. Other kinds of file have typed their numbers already.

    Raises:
        ValueError: nothing is there, a row cannot be read, or rows mix types; names the file, line and remedy.
    """
    path = Path(source)
    if subset is not None and path.exists():
        raise ValueError(f"subset={subset}: {source} is on this machine, and only hub data sets have subsets")
    if path.is_file():
        if split is not None:
            raise ValueError(f"split={split}: the file {source} has no splits; leave split out or name another file")
        return Dataset(_read_file(path, as_text))
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _read_saved(path, split)
        return _read_folder(path, split, as_text)
    text = str(source)
    if "/" not in text and path.suffix not in _FILE_KINDS and not text.startswith((".", "~")):
        raise ValueError(
            f"data {text!r}: no such file or folder; pass a path that exists or, for a data set of the hub, its name "
            f"with the owner, OWNER/{text}"
        )
    if path.suffix in _FILE_KINDS or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ValueError(f"data {text!r}: no such file or folder; pass a path that exists or a hub name owner/name")
    return _read_hub(text, split or "train", subset)


def _read_hub(name: str, split: str, subset: str | None) -> Dataset:
    try:
        return load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises a dozen kinds, from several packages
        raise ValueError(
            f"data {name!r}: no such file or folder here, and the hub gave {type(error).__name__}: {error}. Check the "
            "name, split and subset, or download it and pass its path"
        ) from error


def _read_saved(folder: Path, split: str | None) -> Dataset:
    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{folder} is no whole folder of save_to_disk: {error}") from error
    if not isinstance(saved, DatasetDict):
        if split is not None:
            raise ValueError(f"split={split}: {folder} holds one data set without splits; leave split out")
        return saved
    if (split or "train") not in saved:
        raise ValueError(f"{folder} has no split {split or 'train'!r}, only {', '.join(saved)}: pass one of these")
    return saved[split or "train"]


def _read_folder(folder: Path, split: str | None, as_text: Sequence[str]) -> Dataset:
    files = sorted(path for path in folder.rglob("*") if path.suffix in _FILE_KINDS and path.is_file())
    if not files:
        raise ValueError(f"{folder} holds no {', '.join(_FILE_KINDS)} file: pass a folder of data")
    if split is not None or any(path.name.startswith(_SPLIT_WORDS) for path in files):
        wanted = split or "train"
        chosen = [path for path in files if path.name.startswith(wanted)]
        if not chosen:
            names = ", ".join(path.name for path in files[:5])
            raise ValueError(f"{folder} has no file that starts with {wanted!r}, only {names}: pass another split")
        files = chosen
    try:
        tables = [_read_file(path, as_text) for path in files]
        return Dataset(pa.concat_tables(tables, promote_options="permissive"))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        names = ", ".join(path.name for path in files[:5])
        raise ValueError(f"{folder}: the files {names} do not hold one kind of row ({error}); keep one") from error


def _read_file(path: Path, as_text: Sequence[str]) -> pa.Table:
    if path.suffix == ".parquet":
        try:
            table = pq.read_table(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no readable Parquet file: {error}") from error
    elif path.suffix in (".jsonl", ".json"):
        table = _as_table(path, as_text)
    else:
        raise ValueError(f"{path}: unknown kind of file; pass {', '.join(_FILE_KINDS)}")
    if table.num_rows == 0:
        raise ValueError(f"{path} is empty: pass a file with rows")
    return table


def _as_table(path: Path, as_text: Sequence[str]) -> pa.Table:
    """JSON rows as a table; keys that some rows lack are null there."""
    seen: dict[str, tuple[str, str]] = {}
    tables, chunk = [], []
    for where, row in _json_rows(path):
        _check_kinds(row, where, seen)
        _write_as_text(row, as_text, where)
        chunk.append(row)
        if len(chunk) == _ROWS_A_CHUNK:
            tables.append(_columns(chunk, path))
            chunk = []
    tables.append(_columns(chunk, path))
    return pa.concat_tables(tables, promote_options="permissive")


def _write_as_text(row: dict[str, Any], places: Sequence[str], where: str) -> None:
    for place in places:
        column, _, field = place.partition(".")
        holder, name = (row.get(column), field) if field else (row, column)
        value = holder.get(name) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(value, int | float) and not isinstance(value, bool):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{where}: {place} is {value}; give a text or a finite number")
            holder[name] = str(value)


def _columns(rows: list[dict[str, Any]], path: Path) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"{path} holds values that fit no column: {error}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with the words that say where it is."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            if path.suffix == ".json" and lines.read(1 << 16).lstrip().startswith("["):
                lines.seek(0)
                found: Iterator[tuple[str, Any]] = (
                    (f"{path}, row {n}", row) for n, row in enumerate(_parsed(lines.read(), str(path)), 1)
                )
            else:
                lines.seek(0)
                found = (
                    (f"{path}, line {n}", _parsed(line, f"{path}, line {n}"))
                    for n, line in enumerate(lines, 1)
                    if line.strip()
                )
            for where, row in found:
                if not isinstance(row, dict):
                    raise ValueError(f"{where}: {str(row)[:60]!r} is not an object; write one {{...}} a row")
                yield where, row
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_float=_WrittenFloat)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{where}: not valid JSON at {place}column {error.colno} ({error.msg}); mend it") from None


def _check_kinds(value: Any, where: str, seen: dict[str, tuple[str, str]], column: str = "") -> None:
    """Refuse a column, or a place inside one, that has two kinds of value; null goes with any."""
    if value is None:
        return
    kind = _KINDS[type(value)]
    first, first_where = seen.setdefault(column, (kind, where))
    if kind != first:
        raise ValueError(f"{where}: {column} is {kind} here and {first} in {first_where}: write one type in every row")
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_kinds(inner, where, seen, f"{column}.{name}" if column else name)
    elif isinstance(value, list):
        for inner in value:
            _check_kinds(inner, where, seen, f"{column}[]")
