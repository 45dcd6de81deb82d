"""A teacher behind an OpenAI-compatible server: log-probabilities of given tokens, without loading the model.

The prompt and the response go to ``POST /v1/completions`` as one list of token ids, and the server reports the
log-probability of each of them (:mod:`geopd.training.scored_prompts` reads the answers).

These are log_softmax(logits) at temperature 1: vLLM computes the prompt's log-probabilities from the raw logits
whatever temperature the request has, so another training temperature is refused.

Shapes: B rows, P prompt tokens, T response tokens; nats. Sources: vLLM's completion protocol, SGLang's completion
serving.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from geopd.training.json_http import JsonServer, ServerError
from geopd.training.scored_prompts import NotOfferedError, Row, read_echo, read_prompt_logprobs

__all__ = ["ServerTeacher"]

Style = Literal["auto", "prompt_logprobs", "echo"]

_LOG = logging.getLogger(__name__)


class ServerTeacher:
    """A :class:`~geopd.training.teacher.Teacher` that asks a server.

    In training with several processes each sends its own rows. The first request that fails for good ends the others.

    Args:
        url: ``http(s)://host[:port]``, with or without ``/v1``.
        model: the served name; None takes the only model that ``GET /v1/models`` lists.
        batch_size: sequences a request.
        concurrency: requests under way at the same time.
        timeout: seconds without an answer before an attempt is given up.
        retries: further attempts on connection errors, timeouts, 429 and 5xx.
        backoff: seconds before the second attempt; doubles with each.
        api_key_env: name of the environment variable with the bearer token.
        style: ``prompt_logprobs``, ``echo``, or ``auto``, which takes the first unless the server lacks it.

    Raises:
        ValueError: an argument is out of range. Nothing is sent before the first question.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        batch_size: int = 16,
        concurrency: int = 4,
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 0.5,
        api_key_env: str | None = None,
        style: Style = "auto",
    ) -> None:
        if batch_size < 1 or concurrency < 1:
            raise ValueError(f"batch_size={batch_size}, concurrency={concurrency}: both must be at least 1")
        if style not in get_args(Style):
            raise ValueError(f"style {style!r} is unknown: use one of {', '.join(get_args(Style))}")
        self._server = JsonServer(url, timeout=timeout, retries=retries, backoff=backoff, api_key_env=api_key_env)
        self._batch_size, self._concurrency, self._style = batch_size, concurrency, style
        self._asked_model = model
        self._served: tuple[str, int | None] | None = None

    @property
    def url(self) -> str:
        """The server's address, without ``/v1``."""
        return self._server.url

    def served_model(self) -> tuple[str, int | None]:
        """The model's served name and its longest sequence in tokens, None where the server does not say.

        Raises:
            ValueError: the server is down, does not serve the model asked for, or serves several and none was named.
        """
        if self._served is None:
            self._served = _chosen(self._server.get("/v1/models"), self._asked_model, self.url)
        return self._served

    def tokenize(self, text: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text, or of messages under the server's chat template with a generation prompt.

        Raises:
            ServerError: the server is down, or offers no ``POST /tokenize`` (``status`` 404 or 405).
        """
        body: dict[str, Any] = {"model": self.served_model()[0], "add_special_tokens": False}
        body |= {"prompt": text} if isinstance(text, str) else {"messages": text, "add_generation_prompt": True}
        reply = self._server.post("/tokenize", body)
        tokens = reply.get("tokens") if isinstance(reply, dict) else None
        if not isinstance(tokens, list):
            raise ServerError(f"{self.url}/tokenize answered {str(reply)[:200]!r} without a list of tokens", 404)
        return [int(token) for token in tokens]

    @torch.no_grad()
    def token_logps(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        temperature: float,
    ) -> Tensor:
        """Log-probabilities of the response tokens under the served model.

        Args:
            prompt_ids: (B, P), padded on the left.
            prompt_mask: (B, P), nonzero at prompt tokens.
            completion_ids: (B, T), padded on the right.
            completion_mask: (B, T), nonzero at response tokens; a row may have none, and is not sent then.
            temperature: of training; only 1 can be served.

        Returns:
            (B, T) float32 on the ids' device, nats, 0 where the mask is 0.

        Raises:
            ValueError: the temperature is not 1, a mask has a hole, or the server fails or answers unusably: each
                message names the address, what came back and the remedy.
        """
        if temperature != 1.0:
            raise ValueError(
                f"temperature={temperature}: {self.url} reports log-probabilities at temperature 1 only; train at "
                "temperature 1 or load the teacher in process"
            )
        rows = list(_rows(prompt_ids, prompt_mask, completion_ids, completion_mask))
        logps = torch.zeros(completion_ids.shape, dtype=torch.float32)
        if rows:
            self._check_length(rows)
            for row, values in zip(rows, self._score(rows), strict=True):
                logps[row.index, : len(values)] = torch.tensor(values, dtype=torch.float32)
        return logps.to(completion_ids.device)

    def _check_length(self, rows: Sequence[Row]) -> None:
        longest, limit = max(len(row.ids) for row in rows), self.served_model()[1]
        # One more: servers want room for a generated token even where none is read.
        if limit is not None and longest + 1 > limit:
            raise ValueError(
                f"{self.url} takes {limit} tokens and a prompt with its response has {longest}, plus one: serve with "
                f"--max-model-len {longest + 1} or more, or lower max_completion_length"
            )

    def _score(self, rows: Sequence[Row]) -> list[list[float]]:
        chunks = [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]
        scored = []
        if self._style == "auto":
            self._style, first = self._negotiate(chunks.pop(0))
            scored.append(first)
        pool, cancelled = ThreadPoolExecutor(self._concurrency), threading.Event()
        try:
            pending = [pool.submit(self._ask, chunk, self._style, cancelled) for chunk in chunks]
            ended, _ = wait(pending, return_when=FIRST_EXCEPTION)
            scored += [future.result() for future in pending if future in ended]
        except BaseException:
            # Not waited for: a request under way may take its whole timeout, and its answer is of no use.
            cancelled.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
        return [values for chunk in scored for values in chunk]

    def _negotiate(self, chunk: Sequence[Row]) -> tuple[Style, list[list[float]]]:
        try:
            return "prompt_logprobs", self._ask(chunk, "prompt_logprobs")
        except NotOfferedError as error:
            _LOG.warning("%s; asking with echo and logprobs instead, whose token ids cannot be checked", error)
            return "echo", self._ask(chunk, "echo")

    def _ask(self, chunk: Sequence[Row], style: Style, cancelled: threading.Event | None = None) -> list[list[float]]:
        """Log-probabilities of each row's response tokens."""
        # Neutral sampling, so that a server reporting processed values changes nothing.
        body: dict[str, Any] = {
            "model": self.served_model()[0],
            "prompt": [row.ids for row in chunk],
            "max_tokens": 1,
            "temperature": 1.0,
            "top_p": 1.0,
        }
        body |= {"prompt_logprobs": 1} if style == "prompt_logprobs" else {"echo": True, "logprobs": 1}
        try:
            reply = self._server.post("/v1/completions", body, cancelled)
        except ServerError as error:
            raise _explained(error, style) from None
        return (read_prompt_logprobs if style == "prompt_logprobs" else read_echo)(reply, chunk, self.url)


def _chosen(reply: Any, asked: str | None, url: str) -> tuple[str, int | None]:
    listed = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(listed, list) or not all(isinstance(model, dict) and "id" in model for model in listed):
        raise ServerError(f"{url}/v1/models answered {str(reply)[:200]!r}: the url must be an OpenAI-compatible API")
    limits = {str(model["id"]): model.get("max_model_len") for model in listed}
    if asked is None and len(limits) != 1:
        raise ServerError(f"{url} serves {len(limits)} models ({', '.join(limits)}): pass the teacher's model name")
    name = asked if asked is not None else next(iter(limits))
    if name not in limits:
        raise ServerError(f"{url} serves no model {name!r}, only {', '.join(limits)}: pass one of these names")
    return name, int(limits[name]) if limits[name] is not None else None


def _rows(prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor) -> Iterator[Row]:
    """The unpadded sequences that have a response token."""
    if prompt_ids.shape != prompt_mask.shape or ids.shape != mask.shape or len(ids) != len(prompt_ids):
        raise ValueError(
            f"prompt_ids {tuple(prompt_ids.shape)} and mask {tuple(prompt_mask.shape)}, completion_ids "
            f"{tuple(ids.shape)} and mask {tuple(mask.shape)} do not fit: pass (B, P) twice and (B, T) twice"
        )
    table = zip(prompt_ids.tolist(), prompt_mask.bool().tolist(), ids.tolist(), mask.bool().tolist(), strict=True)
    for index, (prompt, prompt_kept, response, kept) in enumerate(table):
        first, last = len(prompt) - sum(prompt_kept), sum(kept)
        if any(prompt_kept[:first]):
            raise ValueError(f"prompt_mask of row {index} is not padded on the left: pass zeros before the prompt only")
        if any(kept[last:]):
            raise ValueError(f"completion_mask of row {index} has a hole: mask tokens after scoring, not their context")
        if first == len(prompt):
            raise ValueError(f"the prompt of row {index} is empty: the first token of a text has no log-probability")
        if last:
            yield Row(index, prompt[first:] + response[:last], len(prompt) - first)


def _explained(error: ServerError, style: Style) -> ServerError:
    """The same error with the remedy that the server's own words point to."""
    text = str(error)
    refused = error.status in (400, 422)
    if refused and style == "prompt_logprobs" and "prompt_logprobs" in text:
        return NotOfferedError(text, error.status)
    if refused and any(words in text for words in ("context length", "max_model_len", "maximum model length")):
        return ServerError(f"{text}; serve with a larger --max-model-len, or lower max_completion_length", error.status)
    if error.status == 404:
        return ServerError(f"{text}; the server lacks this model or /v1/completions: check both", error.status)
    return error
