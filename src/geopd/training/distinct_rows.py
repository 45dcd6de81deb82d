"""Rows that come again, told apart by what they hold and not by how they are numbered.

dapo-math-17k holds every problem about a hundred times, with an index in each row. Comparing whole rows would let such
an index keep all copies, comparing prompts alone would drop rows that a reward of one's own tells apart (its tests, its
rubric). So everything that is kept is compared, except identifiers: numbers and texts called ``id``, ``idx``,
``index``, ``uid``, ``uuid`` or ``guid``, alone or behind words for a row (``problem_id``, ``uniqueId``), in a column or
inside an object, and pandas' ``__index_level_0__``. ``answer_index`` or ``task_id`` is no such name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, TypeVar

from datasets import Dataset, Value

__all__ = ["distinct_rows"]

_LOG = logging.getLogger(__name__)
_ROWS_A_BATCH = 1000
_NUMBERS = frozenset({"id", "idx", "index", "uid", "uuid", "guid"})
_ROWS = frozenset({"row", "example", "sample", "problem", "question", "prompt", "item", "data", "record", "unique"})

Row = dict[str, Any]
T = TypeVar("T")


def distinct_rows(
    dataset: Dataset,
    read: Callable[[Row, str], T],
    source: object,
    *,
    columns: Sequence[str],
    compared: Sequence[str],
) -> Iterator[tuple[int, T]]:
    """Index and reading of the first of the rows that agree; the number dropped is logged when all are read.

    Args:
        dataset: the rows.
        read: reading of (row, where it is), of values that JSON can hold; refuses unusable rows.
        source: name of the data in messages.
        columns: those that ``read`` sees.
        compared: those that must agree beside the readings; identifiers in them are left out.

    Raises:
        ValueError: there are no rows, or ``read`` refuses one.
    """
    ignored = _identifiers({name: dataset.features[name] for name in compared})
    seen: set[bytes] = set()
    besides = _besides(dataset, [name for name in compared if name not in ignored])
    for index, (row, beside) in enumerate(zip(_rows(dataset, columns), besides, strict=False)):
        reading = read(row, f"{source}, row {index + 1}")
        held = json.dumps([reading, _without(beside, ignored)], sort_keys=True, default=repr)
        digest = hashlib.blake2b(held.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield index, reading
    if not seen:
        raise ValueError(f"{source} has no rows: pass data with rows")
    if len(seen) < len(dataset):
        unread = f"; not compared: {', '.join(ignored)}, rename what is no mere identifier" if ignored else ""
        _LOG.warning(
            "%s: %d of %d rows are duplicates, dropped%s", source, len(dataset) - len(seen), len(dataset), unread
        )


def _rows(dataset: Dataset, columns: Sequence[str]) -> Iterator[Row]:
    names = sorted(columns)
    for batch in dataset.select_columns(names).iter(batch_size=_ROWS_A_BATCH):
        for values in zip(*(batch[name] for name in names), strict=True):
            yield dict(zip(names, values, strict=True))


def _besides(dataset: Dataset, columns: list[str]) -> Iterator[Row]:
    """The columns' values as they are stored: an image is compared by its bytes, not decoded."""
    if not columns:
        yield from repeat({})
    for batch in dataset.select_columns(sorted(columns)).with_format("arrow").iter(batch_size=_ROWS_A_BATCH):
        yield from batch.to_pylist()


def _identifiers(features: Any, within: str = "") -> list[str]:
    """Dotted names of the identifiers among columns and, inside objects, fields."""
    found = []
    for name, feature in features.items():
        if isinstance(feature, dict):
            found += _identifiers(feature, f"{within}{name}.")
        elif isinstance(feature, Value) and _is_identifier(name):
            found.append(f"{within}{name}")
    return found


def _is_identifier(name: str) -> bool:
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)] or [""]
    return name.startswith("__index_level_") or (words[-1] in _NUMBERS and _ROWS.issuperset(words[:-1]))


def _without(value: Row, ignored: list[str], within: str = "") -> Row:
    return {
        name: _without(inner, ignored, f"{within}{name}.") if isinstance(inner, dict) else inner
        for name, inner in value.items()
        if f"{within}{name}" not in ignored
    }
