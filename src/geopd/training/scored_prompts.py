"""What a server answers about a scored prompt, read into log-probabilities and checked.

Two ways are spoken. ``prompt_logprobs`` is vLLM's: a list of ``{token id: {"logprob": ...}}``, null for the first token
and otherwise always with the one that was sent. ``echo`` is OpenAI's older way, which SGLang has: ``token_logprobs``
of the prompt, without ids, and of one generated token behind it.

A server started with ``--logprobs-mode raw_logits`` or ``processed_logits`` may report logits instead. That is noticed:
their exponentials sum to more than 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from geopd.training.json_http import ServerError

__all__ = ["NotOfferedError", "Row", "read_echo", "read_prompt_logprobs"]

_MINUS_INFINITY = -9999.0  # vLLM writes this for -inf, which JSON lacks
_ROUNDING = 1e-3


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence: where it goes in the batch, its tokens, and how many of them are the prompt."""

    index: int
    ids: list[int]
    prompt: int


class NotOfferedError(ServerError):
    """The server answered, but knows no ``prompt_logprobs``."""


def read_prompt_logprobs(reply: Any, rows: Sequence[Row], url: str) -> list[list[float]]:
    """Log-probabilities of each row's response tokens, nats, from vLLM's ``prompt_logprobs``.

    Raises:
        NotOfferedError: the answer has none.
        ServerError: a count is wrong, a token id is missing, or a value is no finite log-probability.
    """
    choices = _choices(reply, len(rows), url)
    return [_of_prompt_logprobs(choice, row, url) for choice, row in zip(choices, rows, strict=True)]


def read_echo(reply: Any, rows: Sequence[Row], url: str) -> list[list[float]]:
    """Log-probabilities of each row's response tokens, nats, from ``echo`` with ``logprobs``.

    Raises:
        ServerError: there are none, a count is wrong, or a value is no finite log-probability.
    """
    choices = _choices(reply, len(rows), url)
    _check_count(reply, rows, url)
    return [_of_echo(choice, row, url) for choice, row in zip(choices, rows, strict=True)]


def _choices(reply: Any, count: int, url: str) -> list[dict[str, Any]]:
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != count:
        found = len(choices) if isinstance(choices, list) else "no"
        raise ServerError(f"{url} returned {found} choices for {count} sequences: {str(reply)[:200]!r}")
    return sorted(choices, key=lambda choice: choice.get("index", 0))


def _check_count(reply: dict[str, Any], chunk: Sequence[Row], url: str) -> None:
    """Without token ids the count of prompt tokens is what shows a truncated or re-tokenised prompt."""
    sent, counted = sum(len(row.ids) for row in chunk), (reply.get("usage") or {}).get("prompt_tokens")
    if counted is not None and counted != sent:
        raise ServerError(f"{url} counted {counted} prompt tokens where {sent} were sent: it must not alter token ids")


def _of_prompt_logprobs(choice: dict[str, Any], row: Row, url: str) -> list[float]:
    entries = choice.get("prompt_logprobs")
    if entries is None:
        raise NotOfferedError(f"{url} returned no prompt_logprobs")
    _check_length(len(entries), len(row.ids), len(row.ids), url)
    values = []
    for place in range(row.prompt, len(row.ids)):
        token, entry = str(row.ids[place]), entries[place] or {}
        if token not in entry:
            raise ServerError(
                f"{url} returned no log-probability of token id {token} at position {place}, only of "
                f"{', '.join(entry) or 'none'}: teacher and student must share token ids"
            )
        reported = [_number(value, place, url) for value in entry.values()]
        if max(reported) > _ROUNDING or sum(map(math.exp, reported)) > 1.0 + _ROUNDING:
            raise _logits(place, url)
        values.append(_finite(_number(entry[token], place, url), place, url))
    return values


def _of_echo(choice: dict[str, Any], row: Row, url: str) -> list[float]:
    found = (choice.get("logprobs") or {}).get("token_logprobs")
    if found is None:
        raise ServerError(
            f"{url} returned no log-probabilities: serve the teacher with one that reports those of the prompt "
            "(vLLM: prompt_logprobs; SGLang: echo with logprobs)"
        )
    _check_length(len(found), len(row.ids), len(row.ids) + 1, url)  # one more where the generated token is listed
    values = [_finite(_number(found[place], place, url), place, url) for place in range(row.prompt, len(row.ids))]
    if max(values) > _ROUNDING:
        raise _logits(row.prompt + values.index(max(values)), url)
    return values


def _check_length(found: int, least: int, most: int, url: str) -> None:
    if not least <= found <= most:
        raise ServerError(
            f"{url} returned log-probabilities of {found} tokens where {least} were sent: turn off its prompt "
            "truncation and check that it takes token ids"
        )


def _number(value: Any, place: int, url: str) -> float:
    number = value.get("logprob") if isinstance(value, dict) else value
    if not isinstance(number, int | float):
        raise ServerError(f"{url} returned {str(value)[:80]!r} at position {place} where a log-probability belongs")
    return float(number)


def _finite(value: float, place: int, url: str) -> float:
    if not math.isfinite(value) or value <= _MINUS_INFINITY:
        raise ServerError(
            f"{url} gives the token at position {place} the log-probability {value:g}: check that the teacher does "
            "not overflow (fp16) and that both share token ids"
        )
    return value


def _logits(place: int, url: str) -> ServerError:
    return ServerError(
        f"{url} returned values above log-probability 0 at position {place}, which are logits: serve with "
        "--logprobs-mode raw_logprobs"
    )
