"""Nested mappings of a configuration against what takes them: keys and types, before anything is built.

A YAML mapping is not typed by the parser of the command line, and Python takes ``"false"`` for true.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["check_settings", "nearest"]

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


def check_settings(
    name: str, settings: Mapping[str, Any], target: type, *, optional: Sequence[str] = (), excluded: Sequence[str] = ()
) -> None:
    """Require that settings are keyword arguments of a class, of the annotated types.

    Args:
        name: of the mapping, for the messages.
        settings: its keys and values.
        target: a class with an annotated ``__init__``; mappings for dataclasses among its arguments are looked into.
        optional: arguments that may be left out although they have no default there.
        excluded: arguments that are set elsewhere.

    Raises:
        ValueError: a key is unknown (the nearest right one is named) or missing, or a value is of another type.
    """
    parameters = {key: each for key, each in inspect.signature(target).parameters.items() if key not in excluded}
    hints = get_type_hints(target.__init__)  # type: ignore[misc]
    for key, value in settings.items():
        if key not in parameters:
            known = list(parameters)
            raise ValueError(f"{name}: {key!r} is unknown{nearest(str(key), known)}; it takes {', '.join(known)}")
        if isinstance(value, Mapping) and (inner := _dataclass_in(hints[key])) is not None:
            check_settings(f"{name}: {key}", value, inner)
        elif not _is(value, hints[key]):
            raise ValueError(f"{name}: {key}={value!r} is not {_kind(hints[key])}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in settings and key not in optional:
            raise ValueError(f"{name} names no {key}: give {_kind(hints[key])} as `{key}`")


def nearest(name: str, known: Sequence[str]) -> str:
    """The words that name the known key closest to this one; empty where none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _dataclass_in(hint: Any) -> type | None:
    return next((part for part in _parts(hint) if dataclasses.is_dataclass(part) and isinstance(part, type)), None)


def _is(value: Any, hint: Any) -> bool:
    return any(_is_one(value, part) for part in _parts(hint))


def _is_one(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(inner) and all(map(_is, value, inner))
    if origin is not None:  # the only other container here is a sequence
        return isinstance(value, (list, tuple)) and all(_is(item, inner[0]) for item in value)
    if hint is Path:
        return isinstance(value, (str, Path))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _kind(hint: Any) -> str:
    texts = [_kind_of_one(part) for part in _parts(hint) if part is not type(None)]
    return " or ".join(dict.fromkeys(texts))


def _kind_of_one(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"a list of {len(inner)} values, each {_kind(inner[0])}"
    if origin is not None:
        return f"a list of values, each {_kind(inner[0])}"
    return _KINDS.get(hint, "a mapping")
