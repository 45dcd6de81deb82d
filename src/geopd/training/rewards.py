"""Reward functions by name, as TRL calls them: ``(prompts, completions, answer=..., **columns) -> list of float``.

``exact`` compares text, ``math_verify`` compares mathematics, ``arithmetic`` and ``strings`` are the miniature's
verifiers, and ``package.module:function`` or ``file.py:function`` is anyone's own. The first four give 0 or 1.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from geopd.problems import parse_prompt, parse_string_prompt, verify, verify_string
from geopd.training.imported_reward import ImportedReward
from geopd.training.killable_verifier import KillableVerifier, VerifierFault

__all__ = [
    "DEFAULT_ANSWER_MARKER",
    "ArithmeticReward",
    "ExactReward",
    "MathReward",
    "StringReward",
    "reward_functions",
]

DEFAULT_ANSWER_MARKER = "Answer:"
"""What dapo-math-17k's prompts ask the last line to begin with."""

_LOG = logging.getLogger(__name__)
_SHOWN = 200
_UNPARSABLE = "UnparsableAnswerError"  # of math_score, which only the worker imports

Reward = Callable[..., list[float]]


def reward_functions(
    names: Sequence[str],
    *,
    answer_marker: str = DEFAULT_ANSWER_MARKER,
    math_seconds: float = 5.0,
    folder: str | Path | None = None,
) -> list[Reward]:
    """Reward functions for ``GRPOTrainer(reward_funcs=...)``.

    Args:
        names: ``exact``, ``math_verify``, ``arithmetic``, ``strings``, ``package.module:function`` or
            ``path/file.py:function``.
        answer_marker: of ``exact``.
        math_seconds: of ``math_verify``, per response.
        folder: where modules and files of one's own are looked for; None is the working directory.

    Raises:
        ValueError: a name is unknown, given twice, or not importable; or math-verify is not installed.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"rewards {', '.join(names)}: one is given twice; TRL reports each by its name")
    made: list[Reward] = []
    for name in names:
        if name == "exact":
            made.append(ExactReward(answer_marker))
        elif name == "math_verify":
            made.append(MathReward(math_seconds))
        elif name == "arithmetic":
            made.append(ArithmeticReward())
        elif name == "strings":
            made.append(StringReward())
        else:
            made.append(ImportedReward(name, folder))
    return made


class ExactReward:
    """1.0 where the text after the last marker, up to the end of its line, is the answer; blanks around it are ignored.

    Args:
        marker: what precedes the final answer; ``""`` compares the whole response.
    """

    __name__ = "exact"

    def __init__(self, marker: str = DEFAULT_ANSWER_MARKER) -> None:
        self.marker = marker

    def __call__(
        self, prompts: list[Any], completions: list[Any], answer: list[str] | None = None, **_: Any
    ) -> list[float]:
        """Scores of a batch. Raises ValueError when the ground truth is missing."""
        truths = _truths(answer, prompts, self.__name__)
        return [float(self._final(_text(c)) == truth.strip()) for c, truth in zip(completions, truths, strict=True)]

    def _final(self, text: str) -> str | None:
        if not self.marker:
            return text.strip()
        _, found, rest = text.rpartition(self.marker)
        return rest.strip().partition("\n")[0].strip() if found else None


class MathReward:
    """1.0 where math-verify finds the final answer equal to the ground truth.

    The comparison runs in a worker that is killed when one response takes longer than ``seconds``. A response that
    could not be judged scores 0 and is counted in :attr:`faults` by kind; the trainer's logger gets the batch's number
    as ``math_verify/not_judged``. A response to a ground truth that math-verify cannot parse scores 0 too, but is
    counted in :attr:`unparsable_answers` by that truth, which is named once; the logger gets the batch's number of such
    responses as ``math_verify/unparsable_answers``.

    Args:
        seconds: per response.

    Raises:
        ValueError: math-verify is not installed.
    """

    __name__ = "math_verify"

    def __init__(self, seconds: float = 5.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("reward math_verify needs the package math-verify: run `pip install math-verify`")
        self.faults: Counter[str] = Counter()
        self.unparsable_answers: Counter[str] = Counter()
        self._verifier = KillableVerifier("geopd.training.math_score:math_score", seconds=seconds)

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        answer: list[str] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float]:
        """Scores of a batch. Raises ValueError when the ground truth is missing."""
        faults, unparsable = self.faults.total(), self.unparsable_answers.total()
        truths = _truths(answer, prompts, self.__name__)
        rows = zip(prompts, completions, truths, strict=True)
        scores = [self._score(prompt, truth, _text(completion)) for prompt, completion, truth in rows]
        if log_metric is not None:
            log_metric("math_verify/not_judged", float(self.faults.total() - faults))
            log_metric("math_verify/unparsable_answers", float(self.unparsable_answers.total() - unparsable))
        return scores

    def close(self) -> None:
        """End the worker; the next batch starts another."""
        self._verifier.close()

    def _score(self, prompt: Any, truth: str, text: str) -> float:
        try:
            return self._verifier.score(truth, text)
        except VerifierFault as fault:
            if fault.kind == _UNPARSABLE:
                self.unparsable_answers[truth] += 1
                if self.unparsable_answers[truth] == 1:
                    _LOG.warning(
                        "math_verify: %s; every response to %r scores 0: mend or drop this row",
                        fault,
                        _text(prompt)[-_SHOWN:],
                    )
                return 0.0
            self.faults[fault.kind] += 1
            if self.faults[fault.kind] == 1:
                _LOG.warning("math_verify: %s; scored 0, as are later ones, unsaid: %r", fault, text[-_SHOWN:])
            return 0.0


class ArithmeticReward:
    """The verifier of :mod:`geopd.problems`: 1.0 where the text after the only ``>`` is the exact result."""

    __name__ = "arithmetic"

    def __call__(self, prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        """Scores of a batch. Raises ValueError when a prompt is no arithmetic question."""
        pairs = zip(prompts, completions, strict=True)
        return [verify(parse_prompt(_text(prompt)), _text(completion)) for prompt, completion in pairs]


class StringReward:
    """The verifier of the second domain: 1.0 where the text after the only ``>`` is the exact result."""

    __name__ = "strings"

    def __call__(self, prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        """Scores of a batch. Raises ValueError when a prompt is no string question."""
        pairs = zip(prompts, completions, strict=True)
        return [verify_string(parse_string_prompt(_text(prompt)), _text(completion)) for prompt, completion in pairs]


def _truths(answer: list[str] | None, prompts: list[Any], name: str) -> list[str]:
    if answer is None:
        raise ValueError(f"reward {name!r} needs the column answer: load data with a ground truth (answer_column)")
    for prompt, truth in zip(prompts, answer, strict=True):
        if not isinstance(truth, str):
            raise ValueError(f"reward {name!r}: the answer to {str(prompt)[:80]!r} is {truth!r}, not a text")
    return answer


def _text(turn: Any) -> str:
    """The text of a prompt or completion: itself, or the last message's content, whose parts are joined."""
    if isinstance(turn, str):
        return turn
    content = turn[-1].get("content") if turn else None
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return content or ""
