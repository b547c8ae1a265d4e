"""HTTP requests to endpoints that speak the OpenAI protocol: bounded, patient, with keys kept out of sight."""

import asyncio
import json
import os
import random
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import httpx

from fusion_hf.errors import InputError

DEFAULT_PATH = "/v1"
CHAT, IMAGES = "chat/completions", "images/generations"
MAX_RESPONSE_BYTES = 2**22
SHOWN = 300  # characters of an endpoint's own words in a reason
CONNECT_SECONDS = 20.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds; doubled from try to try
TO_RETRY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
TO_STOP = frozenset({401, 402, 403, 404})  # what no other record would fare better with


class Refused(Exception):
    """The endpoint will not answer this request; others may fare better."""


class Unavailable(Exception):
    """The endpoint answers nobody: the run has to be given again."""


class KeyFromEnvironment(httpx.Auth):
    """Reads the API key when a request is sent: it is in no object that is pickled, logged or shown in an error."""

    def __init__(self, variable: str):
        self.variable = variable

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {os.environ[self.variable].strip()}"
        yield request


def check_key(variable: str | None) -> None:
    """
    Raises:
        InputError: if the environment has no such variable.
    """
    if variable is not None and not os.environ.get(variable, "").strip():
        raise InputError(f"The environment has no {variable}, which key_variable names; set it to the API key.")


def endpoint_url(base: str, call: str) -> str:
    """Where a call goes: a base without a path gets `/v1`."""
    base = base.rstrip("/")
    return f"{base if urlsplit(base).path else base + DEFAULT_PATH}/{call}"


@dataclass
class Poster:
    """
    Sends JSON to one address.

    Args:
        url: of the call.
        key_variable: environment variable of the API key.
        timeout: seconds of one request.
        patience: how often a failed request is sent.
    """

    url: str
    key_variable: str | None
    timeout: float
    patience: int
    max_bytes: int = MAX_RESPONSE_BYTES
    first_pause: float = FIRST_PAUSE
    last_success: float = field(default=-1.0, init=False)  # of any request, on the monotonic clock
    _client: httpx.AsyncClient | None = field(default=None, init=False, repr=False)

    async def post(self, payload: dict[str, Any]) -> dict[str, Any]:
        """
        The JSON object of the response.

        Raises:
            Refused: if the endpoint will not have this request, or failed on it while it answered others.
            Unavailable: if it answered nothing since the first try, or no request can succeed.
        """
        begin = time.monotonic()
        reason = ""
        for attempt in range(self.patience):
            try:
                answer = await self._try(payload)
                self.last_success = time.monotonic()
                return answer
            except _Again as again:
                reason = str(again)
                if attempt + 1 < self.patience:
                    await asyncio.sleep(self._pause(attempt, again.seconds))
        if self.last_success >= begin:
            raise Refused(f"{reason} in {self.patience} tries")
        raise Unavailable(f"{self.url} gives no answer: {reason} in {self.patience} tries")

    async def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _pause(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, LONGEST_PAUSE)
        # apart from each other, or all who failed together come back together
        return min(self.first_pause * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)

    async def _try(self, payload: dict[str, Any]) -> dict[str, Any]:
        try:
            response, body = await asyncio.wait_for(self._send(payload), self.timeout)
        except (TimeoutError, asyncio.TimeoutError) as error:  # two classes on Python 3.10
            raise _Again(f"no response in {self.timeout:g} s") from error
        except httpx.HTTPError as error:
            raise _Again(f"connection failed ({type(error).__name__})") from error
        status = response.status_code
        if status in TO_RETRY:
            raise _Again(f"HTTP {status}", _retry_after(response))
        if status in TO_STOP:
            raise Unavailable(f"{self.url} answers HTTP {status} {HTTPStatus(status).phrase}: {self._words(body)}")
        if status != HTTPStatus.OK:
            raise Refused(f"HTTP {status}: {self._words(body)}")
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _Again("the response is no JSON") from error
        if not isinstance(answer, dict):
            raise _Again("the response is no JSON object")
        return answer

    async def _send(self, payload: dict[str, Any]) -> tuple[httpx.Response, bytes]:
        if self._client is None:
            auth = None if self.key_variable is None else KeyFromEnvironment(self.key_variable)
            timeout = httpx.Timeout(self.timeout, connect=min(CONNECT_SECONDS, self.timeout), pool=None)
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            self._client = httpx.AsyncClient(auth=auth, timeout=timeout, limits=limits, follow_redirects=False)
        async with self._client.stream("POST", self.url, json=payload) as response:
            return response, await _bounded(response, self.max_bytes)

    def _words(self, body: bytes) -> str:
        """What the endpoint says, in one line without control characters, not at any length, and without our key."""
        text = " ".join(body[: 4 * SHOWN].decode("utf-8", "replace").split())
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable is not None else ""
        text = text.replace(key, "<key>") if key else text
        return "".join(letter for letter in text if letter.isprintable())[:SHOWN]


class _Again(Exception):
    """A failure that may pass; `seconds`: how long the endpoint asks to wait."""

    def __init__(self, reason: str, seconds: float | None = None):
        super().__init__(reason)
        self.seconds = seconds


async def _bounded(response: httpx.Response, most: int) -> bytes:
    """
    Raises:
        Refused: for a body of more bytes; the rest of it is not read.
    """
    body = bytearray()
    async for part in response.aiter_bytes():
        body += part
        if len(body) > most:
            raise Refused(f"the response has more than {most} bytes")
    return bytes(body)


def _retry_after(response: httpx.Response) -> float | None:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else None
