"""What is trained on and evaluated: problems, how they are asked, and how answers are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Rollouts", "VerifiableTask"]

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class VerifiableTask(Generic[P]):
    """Problems with a verifier.

    Args:
        problems: what to ask.
        prompt: the text of a problem.
        verifier: reward of (problem, response text without end and padding tokens), 0 or 1.
        batch_verifier: the same for many at once, where that is cheaper.
    """

    problems: Sequence[P]
    prompt: Callable[[P], str]
    verifier: Callable[[P, str], float]
    batch_verifier: Callable[[Sequence[P], Sequence[str]], Sequence[float]] | None = None

    def judge(self, problems: Sequence[P], responses: Sequence[str]) -> list[float]:
        """The reward of each response to the problem at its place."""
        if self.batch_verifier is not None:
            return list(self.batch_verifier(problems, responses))
        return [self.verifier(problem, text) for problem, text in zip(problems, responses, strict=True)]

    def by_prompt(self) -> dict[str, P]:
        """Problems by their text.

        Raises:
            ValueError: two problems share a text, so a response could not be judged by it.
        """
        found = {self.prompt(problem): problem for problem in self.problems}
        if len(found) != len(self.problems):
            raise ValueError(f"{len(self.problems)} problems have {len(found)} prompts: pass each problem once")
        return found


@dataclass(frozen=True, slots=True)
class Rollouts:
    """How many responses a step samples.

    Args:
        prompts: problems a step.
        samples: responses a problem, at temperature 1; at least two, since GRPO compares them.
        max_new_tokens: longest response, the end token included.

    Raises:
        ValueError: a number is too small.
    """

    prompts: int
    samples: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.samples < 2 or self.max_new_tokens < 1:
            raise ValueError(f"{self}: sample two responses or more, of a token or more, to one prompt or more")
