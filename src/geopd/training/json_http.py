"""JSON over HTTP to a model server: timeouts, retries with exponential backoff, and errors that say what to do.

The standard library's client is enough here (requests are few and large), so the ``train`` extra needs no HTTP package.
Proxies are taken from the environment, as curl takes them; redirects are refused, since they would carry the
authorization header to another host.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

__all__ = ["JsonServer", "ServerError"]

_RETRIED = frozenset({408, 425, 429})
_LONGEST_WAIT = 30.0
_EXCERPT = 300


class ServerError(ValueError):
    """A model server could not be reached or answered unusably.

    Args:
        message: address, what happened, remedy.
        status: HTTP status of the answer, None when there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class JsonServer:
    """GET and POST of JSON documents under one address; safe to use from several threads.

    Connection errors, timeouts and the statuses 408, 425, 429 and 5xx are tried again ``retries`` times, the k-th time
    after ``backoff * 2**k`` seconds (half of it random, at most 30; a ``Retry-After`` in seconds is obeyed up to the
    same limit). Everything else fails at once.

    Args:
        url: ``http(s)://host[:port][/path]``; a trailing ``/v1`` is dropped, paths below give it.
        timeout: seconds without a byte before an attempt is given up.
        retries: further attempts after the first.
        backoff: seconds before the second attempt.
        api_key_env: name of the environment variable holding a bearer token; None sends none.

    Raises:
        ValueError: the address is not http(s), a number is out of range, or the variable is not set.
    """

    def __init__(
        self, url: str, *, timeout: float, retries: int, backoff: float = 0.5, api_key_env: str | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"teacher url {url!r} is no web address: write http://HOST:PORT or https://HOST")
        if not timeout > 0 or retries < 0 or not backoff >= 0:
            raise ValueError(f"timeout={timeout}, retries={retries}, backoff={backoff}: pass positive numbers")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout, self._retries, self._backoff = timeout, retries, backoff
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key_env is not None:
            key = os.environ.get(api_key_env)
            if not key:
                raise ValueError(f"api_key_env={api_key_env}: this environment variable is not set; export the key")
            self._headers["Authorization"] = f"Bearer {key}"
        self._opener = urllib.request.build_opener(_NoRedirect)
        # Not the global generator: the waits must not move the state that training draws from.
        self._random = random.SystemRandom()

    def get(self, path: str) -> Any:
        """The JSON document at a path. Raises :class:`ServerError`."""
        return self._request(path, None)

    def post(self, path: str, body: dict[str, Any], cancelled: threading.Event | None = None) -> Any:
        """The JSON answer to a JSON body; nothing is retried once ``cancelled`` is set. Raises :class:`ServerError`."""
        return self._request(path, json.dumps(body).encode(), cancelled)

    def _request(self, path: str, data: bytes | None, cancelled: threading.Event | None = None) -> Any:
        address, cancelled = self.url + path, cancelled or threading.Event()
        for attempt in range(self._retries + 1):
            request = urllib.request.Request(address, data=data, headers=self._headers)
            asked = None
            try:
                with self._opener.open(request, timeout=self._timeout) as reply:
                    return _decoded(reply.read(), address)
            except urllib.error.HTTPError as error:
                failure, asked = _refusal(error, address), error.headers.get("Retry-After")
                if not (error.code in _RETRIED or error.code >= 500):
                    raise failure from None
            except (OSError, http.client.HTTPException) as error:
                failure = _unreachable(error, address, self._timeout)
            if attempt < self._retries and cancelled.wait(self._wait(attempt, asked)):
                break
        tries = f"{attempt + 1} attempts" if attempt else "one attempt"
        raise ServerError(f"{failure} (given up after {tries})", failure.status)

    def _wait(self, attempt: int, asked: str | None) -> float:
        if asked is not None and asked.isdigit():
            return min(float(asked), _LONGEST_WAIT)
        longest: float = min(self._backoff * 2.0**attempt, _LONGEST_WAIT)
        return longest * self._random.uniform(0.5, 1.0)


def _decoded(raw: bytes, address: str) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        excerpt = raw[:_EXCERPT].decode("utf-8", "replace")
        raise ServerError(
            f"{address} answered something that is not JSON: {excerpt!r}; check that the url is the API's own"
        ) from None


def _refusal(error: urllib.error.HTTPError, address: str) -> ServerError:
    try:
        with error:
            raw = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):  # the status has come, what is said about it stalls or breaks off
        raw = ""
    message = _stated(raw)
    if 300 <= error.code < 400:
        message = f"redirect to {error.headers.get('Location')}; pass the final address"
    elif error.code in (401, 403):
        message = f"{message}; pass api_key_env, the name of the environment variable that holds the key"
    return ServerError(f"{address} answered HTTP {error.code}: {message}", error.code)


def _stated(raw: str) -> str:
    """The message inside an error body of vLLM, SGLang or OpenAI, or the start of whatever came."""
    try:
        body = json.loads(raw)
    except ValueError:
        return repr(raw[:_EXCERPT])
    inner = body.get("error", body) if isinstance(body, dict) else body
    message = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
    return str(message or raw)[: 4 * _EXCERPT]


def _unreachable(error: Exception, address: str, timeout: float) -> ServerError:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return ServerError(
            f"{address} did not answer in {timeout:g} s: raise the teacher's timeout, or lower its batch_size "
            "or concurrency"
        )
    return ServerError(f"{address} could not be reached ({reason or type(error).__name__}): start it or mend the url")
