"""HTTP requests to endpoints that speak the OpenAI protocol: bounded, patient, with keys kept out of sight."""

import asyncio
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import httpx

from fusion_hf.common.endpoints import (
    FIRST_PAUSE,
    MAX_RESPONSE_BYTES,
    Again,
    Refused,
    Unavailable,
    check_status,
    own_words,
    parse_object,
    pause,
    read_key,
)

CONNECT_SECONDS = 20.0


class KeyFromEnvironment(httpx.Auth):
    """Reads the API key when a request is sent: it is in no object that is pickled, logged or shown in an error."""

    def __init__(self, variable: str):
        self.variable = variable

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {read_key(self.variable)}"
        yield request


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
            except Again as again:
                reason = str(again)
                if attempt + 1 < self.patience:
                    await asyncio.sleep(pause(attempt, again.seconds, self.first_pause))
        if self.last_success >= begin:
            raise Refused(f"{reason} in {self.patience} tries")
        raise Unavailable(f"{self.url} gives no answer: {reason} in {self.patience} tries")

    async def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _try(self, payload: dict[str, Any]) -> dict[str, Any]:
        try:
            response, body = await asyncio.wait_for(self._send(payload), self.timeout)
        except (TimeoutError, asyncio.TimeoutError) as error:  # two classes on Python 3.10
            raise Again(f"no response in {self.timeout:g} s") from error
        except httpx.HTTPError as error:
            raise Again(f"connection failed ({type(error).__name__})") from error
        words = own_words(body, self.key_variable)
        check_status(self.url, response.status_code, words, response.headers.get("Retry-After"))
        return parse_object(body)

    async def _send(self, payload: dict[str, Any]) -> tuple[httpx.Response, bytes]:
        if self._client is None:
            auth = None if self.key_variable is None else KeyFromEnvironment(self.key_variable)
            timeout = httpx.Timeout(self.timeout, connect=min(CONNECT_SECONDS, self.timeout), pool=None)
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            self._client = httpx.AsyncClient(auth=auth, timeout=timeout, limits=limits, follow_redirects=False)
        async with self._client.stream("POST", self.url, json=payload) as response:
            return response, await _bounded(response, self.max_bytes)


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
