"""What a pickle is read as: plain values, and stand-ins for the objects and functions that are never imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any


@dataclass(frozen=True, slots=True)
class Constant:
    """A global that stands for a value rather than for something called, such as ``torch.bfloat16``."""

    value: object


@dataclass(slots=True, eq=False)
class Inert:
    """An object of a class that is never imported: its dotted name, the arguments it was made with and its state.

    Compared and hashed by identity; shown by its name alone, for what it holds may be shared without end.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Global:
    """A global of the allow-list, as the arguments of another may hold it: its dotted name and what stands for it."""

    name: str
    build: Callable[..., object]


Allow = Mapping[str, Callable[..., object] | Constant]
"""Dotted global (``collections.OrderedDict``) -> what stands for it: a function of the pickled arguments, or a value.
A function's errors of type ValueError, TypeError, KeyError or IndexError mean a malformed pickle."""


def inert(*names: str) -> dict[str, Callable[..., object]]:
    """Allow-list entries that make an ``Inert`` of each dotted class name."""
    return {name: partial(_inert, name) for name in names}


def _inert(name: str, *args: object) -> Inert:
    return Inert(name, args)


def plain_key(key: object) -> Any:
    """A key that is hashed at once: a scalar, a flat tuple of them, or a stand-in.

    Raises:
        TypeError: if it is none; hashing a deep tuple would exhaust the C stack, or never end.
    """
    flat = type(key) is tuple and all(isinstance(part, _SCALARS) for part in key)
    if not (flat or isinstance(key, (*_SCALARS, Inert))):
        raise TypeError(f"a key of type {type(key).__name__}")
    return key


def nests_deeper(value: object, limit: int) -> bool:
    """Whether a value holds others more than ``limit`` levels down; one that holds itself does."""
    level = [value]
    for _ in range(limit + 1):
        # an object met twice on one level is followed once: shared objects cannot multiply the work
        level = list({id(part): part for holder in level for part in _parts(holder)}.values())
        if not level:
            return False
    return True


def written_out(value: object) -> int:
    """How many values a value of few levels is with each that is shared counted wherever it is held.

    It is what hashing, comparing or printing it would cost: 60 tuples, each holding the one before twice, are 2^60.
    """
    counted: dict[int, int] = {}

    def count(holder: object) -> int:
        if (known := counted.get(id(holder))) is not None:
            return known
        total = 1
        for part in _parts(holder):
            total += count(part) if isinstance(part, _HOLDERS) else 1
        if total > _SMALL:
            counted[id(holder)] = total
        return total

    return count(value)


def _parts(holder: object) -> Iterable[object]:
    match holder:
        case dict():
            return chain(holder, holder.values())
        case list() | tuple():
            return holder
        case Inert():
            return (*holder.args, holder.state)
    return ()


_SCALARS = (str, int, float, bytes, type(None))
_HOLDERS = (dict, list, tuple, Inert)
_SMALL = 8  # smaller ones are counted anew: to remember them would take more memory than they do
