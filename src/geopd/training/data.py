"""Training data in TRL's columns: prompts with their answers, and demonstrations.

Prompts become ``prompt`` (a text, or messages) and ``answer`` (the ground truth, a text); any other column is kept and
reaches the reward functions. Demonstrations become ``messages``, ``prompt`` and ``completion``, or ``text``. Besides
TRL's columns the schema of dapo-math-17k is read: ``prompt`` messages with ``reward_model = {"ground_truth": ...}``.

Duplicates are dropped and counted: dapo-math-17k holds every problem about a hundred times, which would make one epoch
a hundred. Prompts are duplicates when all their columns but identifiers agree, demonstrations when what is trained on
does (:mod:`geopd.training.distinct_rows`). ``problem:arithmetic`` and ``problem:strings`` are the
miniature's own (:mod:`geopd.training.problem_source`).

An answer that is a number becomes a text: in JSON as it is written there (3, 2.50), in a typed column the shortest that
reads back, without ``.0`` behind a whole number below 2**53, since a column of floats puts that there for every value.
"""

from __future__ import annotations

import json
import logging
import math
import random
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from datasets import Dataset

from geopd.training.data_files import read_dataset
from geopd.training.distinct_rows import distinct_rows
from geopd.training.problem_source import is_problem, problem_demonstrations, problem_prompts

__all__ = ["load_demonstrations", "load_prompts"]

_LOG = logging.getLogger(__name__)
_ANSWERS = ("answer", "reward_model.ground_truth")
_EXACT_IN_FLOAT = 2**53
_FORMATS = {"messages": ("messages",), "prompt-completion": ("prompt", "completion"), "text": ("text",)}
_KEPT_BESIDE = ("tools", "chat_template_kwargs")

Row = dict[str, Any]
T = TypeVar("T")


def load_prompts(
    source: str | Path,
    *,
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    answer_column: str | None = None,
    needs_answer: bool = False,
) -> Dataset:
    """Prompts to roll out, with ``prompt``, ``answer`` where there is one, and every other column.

    Args:
        source: as in :func:`geopd.training.data_files.read_dataset`, or ``problem:arithmetic`` or
            ``problem:strings``. A ``messages`` column serves as ``prompt`` where there is none: without its last turn
            when that is the assistant's.
        split: part of a folder, hub data set or problem (``train``, ``selection``, ``held_out``); None is ``train``.
        subset: configuration of a hub data set.
        limit: at most so many prompts, counted after duplicates are dropped; 10,000 for a problem when None.
        seed: draws the ``limit`` at random (and a problem's questions); None takes the first.
        answer_column: where the ground truth is, ``column`` or ``column.field``; None takes ``answer`` or
            ``reward_model.ground_truth``, whichever is there.
        needs_answer: refuse rows without a ground truth.

    Returns:
        Distinct rows, in the order of the source unless drawn. Where answers were numbers in JSON, the column they
        come from holds the same texts.

    Raises:
        ValueError: the source cannot be read, a column is missing, or a row's prompt or answer is unusable; names the
            source, row and remedy.
    """
    _check_limit(limit)
    if is_problem(source):
        return problem_prompts(str(source), split, limit, seed)
    dataset = read_dataset(source, split=split, subset=subset, as_text=(answer_column,) if answer_column else _ANSWERS)
    column = _prompt_column(dataset, source)
    truth = _answer_path(dataset, source, answer_column, needs_answer)
    if truth and truth[0] != "answer" and "answer" in dataset.column_names:
        dataset = dataset.remove_columns("answer")  # the ground truth takes its name
    answer_type = _answer_type(dataset, truth)

    def read(row: Row, where: str) -> tuple[Any, str | None]:
        prompt = row[column]
        _check_text_or_messages(prompt, column, where)
        if column == "messages" and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
            if not prompt:
                raise ValueError(f"{where}: messages hold nothing but an answer; give a user's turn before it")
        answer = _answer(row, truth, answer_type, where) if truth else None
        if needs_answer and answer is None:
            raise ValueError(f"{where}: the answer in {'.'.join(truth)} is null; drop the row or give its answer")
        return prompt, answer

    compared = [name for name in dataset.column_names if name != column]
    found = distinct_rows(dataset, read, source, columns=list({column, *truth[:1]}), compared=compared)
    distinct = _chosen(list(found), limit, seed)
    table = dataset.with_format("arrow")[[index for index, _ in distinct]]
    prompts, answers = zip(*(reading for _, reading in distinct), strict=True)
    several = len(prompts) - len({json.dumps(prompt) for prompt in prompts})
    if several:
        _LOG.warning("%s: %d prompts come again with another answer or column; all are kept", source, several)
    if column != "prompt":
        table = table.append_column("prompt", pa.array(prompts))
    if truth:
        table = table.drop_columns("answer") if "answer" in table.column_names else table
        table = table.append_column("answer", pa.array(answers, pa.string()))
    return Dataset(table)


def load_demonstrations(
    source: str | Path,
    *,
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    form: str | None = None,
) -> Dataset:
    """Demonstrations in one of TRL's forms for supervised training.

    Args:
        source: as for :func:`load_prompts`. ``problem:arithmetic?direct=0.5&slip=0.12`` and
            ``problem:strings?slip=0.12`` set the style of the miniature's demonstrations: shares without working and
            with a wrong digit, 0 by default.
        split: as for :func:`load_prompts`.
        subset: configuration of a hub data set.
        limit: at most so many demonstrations, after duplicates are dropped.
        seed: draws the ``limit`` at random; None takes the first.
        form: ``messages``, ``prompt-completion`` or ``text``; needed only where the columns allow several.

    Returns:
        The columns of the form, and ``tools`` and ``chat_template_kwargs`` where the source has them.

    Raises:
        ValueError: the source cannot be read, has columns of no form or of several, or a row is unusable; names the
            source, row and remedy.
    """
    _check_limit(limit)
    if is_problem(source):
        return problem_demonstrations(str(source), split, limit, seed)
    dataset = read_dataset(source, split=split, subset=subset)
    columns = _FORMATS[_form(dataset, source, form)]

    def read(row: Row, where: str) -> tuple[Any, ...]:
        values = tuple(row[column] for column in columns)
        for column, value in zip(columns, values, strict=True):
            _check_text_or_messages(value, column, where)
        if columns == ("messages",) and all(message["role"] != "assistant" for message in values[0]):
            raise ValueError(f"{where}: messages hold no assistant's turn to learn from; drop the row")
        if len({type(value) for value in values}) > 1:
            raise ValueError(f"{where}: prompt and completion must both be text or both be messages")
        return values

    beside = [column for column in _KEPT_BESIDE if column in dataset.column_names]
    distinct = [index for index, _ in distinct_rows(dataset, read, source, columns=columns, compared=beside)]
    return dataset.select_columns([*columns, *beside]).select(_chosen(distinct, limit, seed))


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: pass the number of rows to use, at least 1")


def _chosen(items: list[T], limit: int | None, seed: int | None) -> list[T]:
    if limit is None or limit >= len(items):
        return items
    return items[:limit] if seed is None else random.Random(seed).sample(items, limit)


def _prompt_column(dataset: Dataset, source: str | Path) -> str:
    for column in ("prompt", "messages"):
        if column in dataset.column_names:
            return column
    raise ValueError(f"{source} has no column prompt or messages, only {_listed(dataset)}: rename the right one")


def _answer_path(dataset: Dataset, source: str | Path, asked: str | None, needed: bool) -> tuple[str, ...]:
    """Column and field of the ground truth, () where there is none."""
    for path in (asked,) if asked else _ANSWERS:
        column, _, field = path.partition(".")
        if column not in dataset.column_names:
            continue
        features = dataset.features[column]
        if not field or (isinstance(features, dict) and field in features):
            return (column, field) if field else (column,)
    if asked or needed:
        raise ValueError(
            f"{source} has no column {asked or 'answer or reward_model.ground_truth'}, only {_listed(dataset)}: pass "
            "answer_column, the name of the one with the ground truth"
        )
    return ()


def _listed(dataset: Dataset) -> str:
    return ", ".join(dataset.column_names) or "none"


def _answer_type(dataset: Dataset, path: tuple[str, ...]) -> str:
    """Name of the ground truth's type, "" for what is no single value."""
    feature: Any = dataset.features
    for name in path:
        feature = feature[name]
    return str(getattr(feature, "dtype", ""))


def _answer(row: Row, path: tuple[str, ...], kind: str, where: str) -> str | None:
    value = row[path[0]]
    if len(path) > 1 and value is not None:
        value = value[path[1]]
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        if value.is_integer() and abs(value) < _EXACT_IN_FLOAT:
            return str(int(value))
        return str(np.dtype(kind).type(value))  # of a float32 the shortest text, not all digits of its float64
    raise ValueError(f"{where}: the answer in {'.'.join(path)} is {str(value)[:60]!r}; give one text or number")


def _form(dataset: Dataset, source: str | Path, asked: str | None) -> str:
    if asked is not None and asked not in _FORMATS:
        raise ValueError(f"form {asked!r} is unknown: use one of {', '.join(_FORMATS)}")
    present = [form for form, columns in _FORMATS.items() if set(columns) <= set(dataset.column_names)]
    if asked is not None and asked in present:
        return asked
    if asked is None and len(present) == 1:
        return present[0]
    if asked is None and present:
        raise ValueError(f"{source} has the columns of several forms: pass form, one of {', '.join(present)}")
    needed = " and ".join(_FORMATS[asked]) if asked else "messages, or prompt and completion, or text"
    raise ValueError(f"{source} lacks {needed}, it has {_listed(dataset)}: rename its columns")


def _check_text_or_messages(value: Any, column: str, where: str) -> None:
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{where}: {column} is an empty text; drop the row")
        return
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {column} is {str(value)[:60]!r}; give a text or a list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"{where}: {column} holds {str(message)[:60]!r}; a message has a role and content")
