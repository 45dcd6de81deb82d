"""The built-in problems as training data: ``problem:arithmetic`` and ``problem:strings``, with options behind ``?``."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast, get_args
from urllib.parse import parse_qsl

from datasets import Dataset

from geopd.problems import (
    Demonstration,
    DemonstrationStyle,
    Split,
    demonstrate,
    demonstrate_string,
    distinct_problems,
    distinct_string_problems,
)

__all__ = ["is_problem", "problem_demonstrations", "problem_prompts"]

_PREFIX = "problem:"
_DRAWN = 10_000

Options = dict[str, float]


@dataclass(frozen=True, slots=True)
class _BuiltIn:
    """A problem by its parts.

    Args:
        draw: distinct problems for (split, count, seed).
        options: of its demonstrations.
        demonstrate: one demonstration for (problem, options, rng).
    """

    draw: Callable[[Split, int, int], list[Any]]
    options: tuple[str, ...]
    demonstrate: Callable[[Any, Options, random.Random], Demonstration]


_BUILT_IN = {
    "arithmetic": _BuiltIn(
        distinct_problems,
        ("direct", "slip"),
        lambda problem, options, rng: demonstrate(problem, DemonstrationStyle(**options), rng),
    ),
    "strings": _BuiltIn(
        distinct_string_problems,
        ("slip",),
        lambda problem, options, rng: demonstrate_string(problem, options.get("slip", 0.0), rng),
    ),
}


def is_problem(source: object) -> bool:
    """Whether a data source names a built-in problem."""
    return str(source).startswith(_PREFIX)


def problem_prompts(source: str, split: str | None, limit: int | None, seed: int | None) -> Dataset:
    """``prompt`` and ``answer`` of distinct problems.

    Args:
        source: ``problem:arithmetic`` or ``problem:strings``.
        split: ``train``, ``selection`` or ``held_out``; None is ``train``.
        limit: number of problems; None is 10,000.
        seed: of the draw; None is 0.

    Raises:
        ValueError: the problem, an option or the split is unknown; names the source and the choices.
    """
    built_in, _ = _asked(source, demonstrated=False)
    problems = _drawn(built_in, source, split, limit, seed)
    return Dataset.from_dict({"prompt": [p.prompt for p in problems], "answer": [p.answer for p in problems]})


def problem_demonstrations(source: str, split: str | None, limit: int | None, seed: int | None) -> Dataset:
    """``prompt`` and ``completion`` of one demonstration of each of distinct problems.

    Args:
        source: ``problem:arithmetic?direct=0.5&slip=0.12`` or ``problem:strings?slip=0.12``: shares without working and
            with a wrong digit, 0 by default.
        split: as for :func:`problem_prompts`.
        limit: as for :func:`problem_prompts`.
        seed: of the draw and of the demonstrations; None is 0.

    Raises:
        ValueError: as for :func:`problem_prompts`, or a share is outside [0, 1].
    """
    built_in, options = _asked(source, demonstrated=True)
    rng = random.Random(f"demonstrations {seed or 0}")
    problems = _drawn(built_in, source, split, limit, seed)
    texts = [built_in.demonstrate(problem, options, rng) for problem in problems]
    return Dataset.from_dict({"prompt": [t.prompt for t in texts], "completion": [t.response for t in texts]})


def _asked(source: str, *, demonstrated: bool) -> tuple[_BuiltIn, Options]:
    """The problem a source like ``problem:arithmetic?slip=0.1`` names, and its options; prompts take none."""
    name, _, query = source.removeprefix(_PREFIX).partition("?")
    if name not in _BUILT_IN:
        known = " and ".join(f"{_PREFIX}{each}" for each in _BUILT_IN)
        raise ValueError(f"data {source!r}: no such problem; the built-in ones are {known}")
    options = _BUILT_IN[name].options if demonstrated else ()
    found = dict(parse_qsl(query, keep_blank_values=True))
    for key, value in found.items():
        if key not in options or not _is_number(value):
            known = f"write {' or '.join(f'{option}=0.1' for option in options)}" if options else "it takes none here"
            raise ValueError(f"data {source!r}: unusable option {key}={value}; {known}")
    return _BUILT_IN[name], {key: float(value) for key, value in found.items()}


def _drawn(built_in: _BuiltIn, source: str, split: str | None, limit: int | None, seed: int | None) -> list[Any]:
    wanted = split or "train"
    if wanted not in get_args(Split):
        raise ValueError(f"data {source!r} has no split {wanted!r}: use one of {', '.join(get_args(Split))}")
    return built_in.draw(cast(Split, wanted), _DRAWN if limit is None else limit, seed or 0)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
