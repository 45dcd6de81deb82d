"""The benchmarks a trained model is judged on: the task itself, slices of it, and the second domain.

Six are reported for a run that trains in a subspace beside one that trains freely; ``selection`` serves for choosing
and matching checkpoints, so it is no report. None holds a problem of a train split. The problems of every benchmark but
``no_working`` are drawn by themselves; those of ``no_working`` are the ones of ``held_out`` with the same count and
seed, so that the two differ in the prompt only.

Source: Figures 6 and 8 of arXiv 2606.07082, which report six benchmarks of mathematics.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from geopd.problems.arithmetic import ANSWER_MARK, Problem, verify
from geopd.problems.splits import distinct, distinct_problems, draw_problem
from geopd.problems.strings import StringProblem, distinct_string_problems, verify_string

__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkTask", "benchmark_task", "is_long_chain", "verify_answer_alone"]

_MOST_PROBLEMS = 5_000  # every slice has more
_SMALLEST_OF_THREE_DIGITS = 100
_LONGEST_CHAIN = {"+": 3, "-": 2}


class BenchmarkTask(NamedTuple):
    """What a benchmark asks: the problems, the text of each, and the reward of (problem, response), 0 or 1."""

    problems: list[Any]
    prompt: Callable[[Any], str]
    verifier: Callable[[Any, str], float]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark by its parts.

    Args:
        asks: what it asks, in one plain sentence.
        draw: ``count`` distinct problems for (count, seed).
        prompt: the text of a problem; all texts of a benchmark have one length.
        verifier: reward of (problem, response text without end and padding tokens), 0 or 1.
    """

    asks: str
    draw: Callable[[int, int], list[Any]]
    prompt: Callable[[Any], str]
    verifier: Callable[[Any, str], float]


def benchmark_task(name: str, count: int, seed: int) -> BenchmarkTask:
    """A benchmark's problems with their texts and verifier.

    Args:
        name: a key of :data:`BENCHMARKS`.
        count: how many distinct problems, 1 to 5,000.
        seed: of the draw; the same list on every machine.

    Raises:
        ValueError: the name is unknown or the count out of range.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r} is unknown: use one of {', '.join(BENCHMARKS)}")
    if not 0 < count <= _MOST_PROBLEMS:
        raise ValueError(f"benchmark {name!r} cannot give {count} problems: ask for 1 to {_MOST_PROBLEMS}")
    benchmark = BENCHMARKS[name]
    return BenchmarkTask(benchmark.draw(count, seed), benchmark.prompt, benchmark.verifier)


def is_long_chain(problem: Problem) -> bool:
    """Whether the carries or borrows run as long as three columns allow.

    That is three carries in a row in an addition and two borrows in a row in a subtraction: the larger operand minus
    the smaller never borrows in its last column.
    """
    length = _LONGEST_CHAIN[problem.operator]
    chain = [carry for carry, _ in problem.columns()][:length]
    return chain == [1] * length


def verify_answer_alone(problem: Problem, response: str) -> float:
    """Binary reward of a response to a prompt that ends in ``>``: 1.0 iff it is exactly the answer, else 0.0."""
    return float(response == problem.answer)


def _slice(name: str, keep: Callable[[Problem], bool]) -> Callable[[int, int], list[Problem]]:
    """Draws of the held-out problems that ``keep`` accepts, by a random stream of the slice's own."""

    def drawn(count: int, seed: int) -> list[Problem]:
        rng = random.Random(f"{name} {seed}")
        return distinct(lambda: _draw_held_out(rng, keep), count)

    return drawn


def _draw_long_chains(count: int, seed: int) -> list[Problem]:
    """Long chains of each operator with equal probability: two borrows are three times as frequent as three carries."""
    rng = random.Random(f"carries {seed}")

    def draw() -> Problem:
        operator = rng.choice(("+", "-"))
        return _draw_held_out(rng, lambda problem: problem.operator == operator and is_long_chain(problem))

    return distinct(draw, count)


def _draw_held_out(rng: random.Random, keep: Callable[[Problem], bool]) -> Problem:
    while True:
        problem = draw_problem(rng, "held_out")
        if keep(problem):
            return problem


def _question(problem: Problem | StringProblem) -> str:
    return problem.prompt


def _question_and_mark(problem: Problem) -> str:
    return f"{problem.prompt}{ANSWER_MARK}"


def _has_three_digits(problem: Problem) -> bool:
    return min(problem.a, problem.b) >= _SMALLEST_OF_THREE_DIGITS


BENCHMARKS: dict[str, Benchmark] = {
    "held_out": Benchmark(
        "Additions and subtractions like those trained on, of operands never trained on.",
        lambda count, seed: distinct_problems("held_out", count, seed),
        _question,
        verify,
    ),
    "carries": Benchmark(
        "Held-out additions with three carries in a row and subtractions with two borrows in a row, the longest there "
        "are.",
        _draw_long_chains,
        _question,
        verify,
    ),
    "subtraction": Benchmark(
        "Held-out subtractions only, half of them with a negative result.",
        _slice("subtraction", lambda problem: problem.operator == "-"),
        _question,
        verify,
    ),
    "no_working": Benchmark(
        "Held-out problems whose answer must follow at once, because the prompt already ends in the answer mark.",
        lambda count, seed: distinct_problems("held_out", count, seed),
        _question_and_mark,
        verify_answer_alone,
    ),
    "three_digits": Benchmark(
        "Held-out problems in which both operands have three digits, the largest there are.",
        _slice("three_digits", _has_three_digits),
        _question,
        verify,
    ),
    "strings": Benchmark(
        "Copying, reversing or sorting three to six digits, a second domain that training on arithmetic leaves out.",
        lambda count, seed: distinct_string_problems("held_out", count, seed),
        _question,
        verify_string,
    ),
    "selection": Benchmark(
        "Problems like the held-out ones, of a split of their own, for choosing and matching checkpoints.",
        lambda count, seed: distinct_problems("selection", count, seed),
        _question,
        verify,
    ),
}
"""Benchmarks by name, in the order they are shown: the six that are reported, then ``selection``."""
