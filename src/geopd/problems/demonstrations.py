"""Demonstrations: (prompt, response) texts that a model is trained to imitate.

Arithmetic demonstrations are *clean*, *slipped* (one digit wrong) or *direct* (the working left out); a
:class:`DemonstrationStyle` says how often. Base pretraining adds neighbouring tasks (copy, reverse, sort), so that the
base model is not a model of arithmetic only; they are a domain of their own as well (:mod:`geopd.problems.strings`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from geopd.problems.arithmetic import ANSWER_MARK, Problem, write_columns
from geopd.problems.splits import draw_problem
from geopd.problems.strings import StringProblem, draw_string_problem, random_string_problem

__all__ = [
    "CLEAN",
    "DIRECT",
    "Demonstration",
    "DemonstrationStyle",
    "base_mixture",
    "demonstrate",
    "demonstrate_string",
    "demonstrations",
    "string_demonstrations",
    "string_task",
]


def _check_probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value} is not a probability: use a number from 0 to 1")


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the response to imitate, without the end token."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class DemonstrationStyle:
    """How demonstrations of arithmetic are written.

    Args:
        direct: probability that the working is left out, leaving ``>answer``.
        slip: probability that one digit is wrong; the answer then follows the wrong working, so it is wrong too.

    Raises:
        ValueError: a probability is outside [0, 1].
    """

    direct: float = 0.0
    slip: float = 0.0

    def __post_init__(self) -> None:
        _check_probability("direct", self.direct)
        _check_probability("slip", self.slip)


CLEAN = DemonstrationStyle()
DIRECT = DemonstrationStyle(direct=1.0)


def demonstrate(problem: Problem, style: DemonstrationStyle, rng: random.Random) -> Demonstration:
    """One demonstration of a problem in a style.

    A slip replaces the digit of one uniformly chosen column by another digit; the answer is read off the slipped
    columns. A slipped demonstration therefore never verifies, and any other always does.
    """
    columns = problem.columns()
    if rng.random() < style.slip:
        place = rng.randrange(len(columns))
        carry, digit = columns[place]
        columns[place] = (carry, (digit + rng.randint(1, 9)) % 10)
    working = "" if rng.random() < style.direct else write_columns(columns)
    return Demonstration(problem.prompt, f"{working}{ANSWER_MARK}{problem.read_off(columns)}")


def demonstrations(count: int, style: DemonstrationStyle, rng: random.Random) -> list[Demonstration]:
    """``count`` demonstrations of problems drawn, with repeats, from the train split."""
    return [demonstrate(draw_problem(rng, "train"), style, rng) for _ in range(count)]


def string_task(rng: random.Random) -> Demonstration:
    """Copy, reverse or sort one to six digits: ``c  4821=`` -> ``>4821``. The prompt is eight characters as well."""
    problem = random_string_problem(rng, shortest=1)
    return Demonstration(problem.prompt, problem.response)


def demonstrate_string(problem: StringProblem, slip: float, rng: random.Random) -> Demonstration:
    """One demonstration of a string problem; with probability ``slip`` one digit of the answer is wrong.

    The wrong digit stands in a uniformly chosen place and is any other digit with equal probability. A slipped
    demonstration therefore never verifies, and any other always does.

    Raises:
        ValueError: ``slip`` is outside [0, 1].
    """
    _check_probability("slip", slip)
    answer = problem.answer
    if rng.random() < slip:
        place = rng.randrange(len(answer))
        wrong = (int(answer[place]) + rng.randint(1, 9)) % 10
        answer = f"{answer[:place]}{wrong}{answer[place + 1 :]}"
    return Demonstration(problem.prompt, f"{ANSWER_MARK}{answer}")


def string_demonstrations(count: int, slip: float, rng: random.Random) -> list[Demonstration]:
    """``count`` demonstrations of string problems drawn, with repeats, from the train split of the second domain.

    Raises:
        ValueError: ``slip`` is outside [0, 1].
    """
    return [demonstrate_string(draw_string_problem(rng, "train"), slip, rng) for _ in range(count)]


def base_mixture(count: int, worked: float, slip: float, rng: random.Random) -> list[Demonstration]:
    """A pretraining mixture.

    Each text is, with probability ``worked``, an arithmetic demonstration with working and slips at rate ``slip``;
    otherwise, with equal probability, direct arithmetic without slips or a string task. All arithmetic comes from the
    train split.

    Raises:
        ValueError: ``worked`` or ``slip`` is outside [0, 1].
    """
    _check_probability("worked", worked)
    noisy = DemonstrationStyle(slip=slip)
    texts = []
    for _ in range(count):
        if rng.random() < worked:
            texts.append(demonstrate(draw_problem(rng, "train"), noisy, rng))
        elif rng.random() < 0.5:
            texts.append(demonstrate(draw_problem(rng, "train"), DIRECT, rng))
        else:
            texts.append(string_task(rng))
    return texts
