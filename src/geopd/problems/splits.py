"""Three disjoint splits of the arithmetic problems, and seeded draws from them.

A problem belongs to a split by a keyed hash of its *unordered operands*. The hash is not a function of the answer (a
split by the answer's residue would test one kind of sum only), and it ignores the order and the operator, so that
``12+30``, ``30+12``, ``12-30`` and ``30-12``, which share most of their working, are always on the same side.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

from geopd.problems.arithmetic import Operator, Problem

__all__ = ["Split", "check_split", "distinct", "distinct_problems", "draw_problem", "split_by_hash", "split_of"]

P = TypeVar("P")
Split = Literal["train", "selection", "held_out"]

_SALT = b"geopd arithmetic split"
_BUCKETS = 10
_OPERATORS: tuple[Operator, Operator] = ("+", "-")
# Shorter operands are few, so they are drawn less often; each length still appears in every split.
_LENGTH_WEIGHTS = (1, 2, 3)
_RANGES = ((0, 9), (10, 99), (100, 999))
_MAX_DISTINCT = 50_000


def split_of(problem: Problem) -> Split:
    """The split of a problem: ``held_out`` for one hash bucket in ten, ``selection`` for another, else ``train``."""
    low, high = sorted((problem.a, problem.b))
    return split_by_hash(f"{low},{high}", _SALT)


def split_by_hash(text: str, salt: bytes) -> Split:
    """The split of whatever is told apart by ``text``: bucket 0 or 1 of ten is ``held_out`` or ``selection``.

    Args:
        text: equal for all problems that must share a split.
        salt: key of the hash, one a domain.
    """
    digest = hashlib.blake2b(text.encode(), key=salt, digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % _BUCKETS
    if bucket == 0:
        return "held_out"
    return "selection" if bucket == 1 else "train"


def check_split(split: str) -> None:
    """Raises ValueError when the split's name is unknown."""
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} is unknown: use one of {', '.join(get_args(Split))}")


def draw_problem(rng: random.Random, split: Split) -> Problem:
    """One random problem of a split.

    The length of each operand is 1, 2 or 3 digits with weights 1:2:3, the operand uniform in that length, the operator
    a fair coin; draws outside the split are rejected.

    Raises:
        ValueError: the split's name is unknown.
    """
    check_split(split)
    while True:
        ranges = rng.choices(_RANGES, weights=_LENGTH_WEIGHTS, k=2)
        problem = Problem(rng.randint(*ranges[0]), rng.choice(_OPERATORS), rng.randint(*ranges[1]))
        if split_of(problem) == split:
            return problem


def distinct_problems(split: Split, count: int, seed: int) -> list[Problem]:
    """``count`` different problems of a split; the same seed gives the same list on every machine.

    Raises:
        ValueError: more problems are asked for than can be drawn without repeats in reasonable time.
    """
    rng = random.Random(f"{split} {seed}")
    return distinct(lambda: draw_problem(rng, split), count)


def distinct(draw: Callable[[], P], count: int, most: int = _MAX_DISTINCT) -> list[P]:
    """The first ``count`` different problems that ``draw`` gives.

    Args:
        draw: the next random problem, by which a repeat is told.
        count: how many, 1 to ``most``.
        most: as many as surely come, so that the search ends.

    Raises:
        ValueError: ``count`` is outside that range.
    """
    if not 0 < count <= most:
        remedy = "ask for fewer distinct problems" if count > most else "ask for at least one"
        raise ValueError(f"count={count} problems is outside 1..{most}: {remedy}")
    found: dict[P, None] = {}
    while len(found) < count:
        found.setdefault(draw())
    return list(found)
