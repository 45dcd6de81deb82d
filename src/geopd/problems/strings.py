"""The second verifiable domain: copy, reverse or sort a string of digits.

A prompt is eight characters as in arithmetic, ``{task}{digits:>6}=``, and there is no working to show::

    c  4821=  ->  >4821        copy
    r  4821=  ->  >1284        reverse
    s  4821=  ->  >1248        sort

**Splits.** A question belongs to a split by a keyed hash of its digits in sorted order, which fixes their number too.
Copying, reversing and sorting one multiset of digits, in whatever order they are asked, is always on the same side: the
sorted answer to one would otherwise be that to many others. Drawn questions have three to six digits, since there are
few shorter ones.

The splits hold for training on this domain. The base mixture draws its string tasks from all questions, so that a model
trained on it may have met a held-out one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from geopd.problems.arithmetic import ANSWER_MARK
from geopd.problems.splits import Split, check_split, distinct, split_by_hash

__all__ = [
    "STRING_DIGITS",
    "STRING_TASKS",
    "StringProblem",
    "StringTask",
    "distinct_string_problems",
    "draw_string_problem",
    "parse_string_prompt",
    "random_string_problem",
    "split_of_string",
    "verify_string",
]

StringTask = Literal["c", "r", "s"]

STRING_TASKS: dict[StringTask, str] = {"c": "copy", "r": "reverse", "s": "sort"}
STRING_DIGITS = 6
_DIGITS = "0123456789"
_SHORTEST_DRAWN = 3
_SALT = b"geopd string split"


@dataclass(frozen=True, slots=True)
class StringProblem:
    """One question: copy, reverse or sort ``digits``.

    Args:
        task: ``"c"`` to copy, ``"r"`` to reverse, ``"s"`` to sort in ascending order, repeats kept.
        digits: one to six characters of ``0123456789``; leading zeros count.

    Raises:
        ValueError: the task is another character, or the digits are none, too many or no digits.
    """

    task: StringTask
    digits: str

    def __post_init__(self) -> None:
        if self.task not in get_args(StringTask):
            known = ", ".join(f"{task} ({name})" for task, name in STRING_TASKS.items())
            raise ValueError(f"task {self.task!r} is unknown: use one of {known}")
        if not 1 <= len(self.digits) <= STRING_DIGITS or not set(self.digits) <= set(_DIGITS):
            raise ValueError(f"digits {self.digits!r} are no string to work on: use 1 to {STRING_DIGITS} of {_DIGITS}")

    @property
    def prompt(self) -> str:
        """The question as the model reads it: eight characters ending in ``=``."""
        return f"{self.task}{self.digits:>{STRING_DIGITS}}="

    @property
    def answer(self) -> str:
        """The digits copied, reversed or sorted: as many as were given."""
        if self.task == "c":
            return self.digits
        return self.digits[::-1] if self.task == "r" else "".join(sorted(self.digits))

    @property
    def response(self) -> str:
        """The full response, ``>answer``."""
        return f"{ANSWER_MARK}{self.answer}"


def verify_string(problem: StringProblem, response: str) -> float:
    """Binary reward of a response: 1.0 iff the text after its only ``>`` is the exact answer, else 0.0.

    What stands before the mark is not judged, as in :func:`geopd.problems.verify`; end and padding tokens must have
    been removed.
    """
    _, mark, answer = response.partition(ANSWER_MARK)
    return float(bool(mark) and answer == problem.answer)


def parse_string_prompt(prompt: str) -> StringProblem:
    """The problem a prompt asks, the inverse of :attr:`StringProblem.prompt`.

    Raises:
        ValueError: the text is not eight characters of the form ``{task}{digits:>6}=``.
    """
    for task in STRING_TASKS:
        if prompt.startswith(task):
            try:
                problem = StringProblem(task, prompt[1:-1].lstrip(" "))
            except ValueError:
                break
            if problem.prompt == prompt:
                return problem
    raise ValueError(f"prompt {prompt!r} is not a string question: write '{{task}}{{digits:>6}}=', the task c, r or s")


def split_of_string(problem: StringProblem) -> Split:
    """The split of a problem: ``held_out`` for one hash bucket in ten, ``selection`` for another, else ``train``."""
    return split_by_hash("".join(sorted(problem.digits)), _SALT)


def random_string_problem(rng: random.Random, shortest: int) -> StringProblem:
    """One random problem of any split: the task, the length from ``shortest`` to six, and each digit are uniform."""
    task = rng.choice(tuple(STRING_TASKS))
    return StringProblem(task, "".join(rng.choices(_DIGITS, k=rng.randint(shortest, STRING_DIGITS))))


def draw_string_problem(rng: random.Random, split: Split) -> StringProblem:
    """One random problem of three to six digits of a split; draws outside the split are rejected.

    Raises:
        ValueError: the split's name is unknown.
    """
    check_split(split)
    while True:
        problem = random_string_problem(rng, _SHORTEST_DRAWN)
        if split_of_string(problem) == split:
            return problem


def distinct_string_problems(split: Split, count: int, seed: int) -> list[StringProblem]:
    """``count`` different problems of a split; the same seed gives the same list on every machine.

    Raises:
        ValueError: more problems are asked for than can be drawn without repeats in reasonable time.
    """
    rng = random.Random(f"strings {split} {seed}")
    return distinct(lambda: draw_string_problem(rng, split), count)
