"""Whether a response's final answer equals the ground truth, by math-verify: the target of the verifier's worker.

A module of its own, so that the worker imports math-verify before the first item's time begins, and the trainer's
process not at all.
"""

from __future__ import annotations

from math_verify import parse, verify

__all__ = ["UnparsableAnswerError", "math_score"]


class UnparsableAnswerError(ValueError):
    """The ground truth is no mathematics; no response is to blame."""


def math_score(answer: str, response: str) -> float:
    """1.0 when math-verify finds the response's final answer equal to the ground truth, else 0.0.

    The ground truth is put into ``\\boxed{}`` unless it carries LaTeX delimiters: bare ``2\\sqrt{3}`` would be read as
    2. There is no time limit here: math-verify's own are signals, and the worker is killed from outside.

    Raises:
        UnparsableAnswerError: the ground truth cannot be parsed.
    """
    delimited = "$" in answer or "\\boxed" in answer
    truth = parse(answer if delimited else f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not truth:
        raise UnparsableAnswerError(f"the answer {answer[:80]!r} cannot be parsed as mathematics")
    return float(verify(truth, parse(response, parsing_timeout=None), timeout_seconds=None))
