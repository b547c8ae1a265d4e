"""The client of the OpenAI protocol, for threads and for coroutines: bounded, patient, with keys kept out of sight."""

import asyncio
import json
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import httpx

from fusion_hf.common.endpoints import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    MAX_RESPONSE_BYTES,
    EndpointUnavailable,
    RequestRejected,
    RetryableError,
    check_status,
    own_words,
    parse_object,
    pause,
    read_key,
)
from fusion_hf.common.errors import InputError

CONNECT_SECONDS = 20.0
Connections = TypeVar("Connections", httpx.Client, httpx.AsyncClient)


class KeyFromEnvironment(httpx.Auth):
    """Reads the API key when a request is sent: it is in no object that is pickled, logged or shown in an error."""

    def __init__(self, variable: str):
        self.variable = variable

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {read_key(self.variable)}"
        yield request


class _TimedOut(RetryableError):
    """No answer within the time of a request."""


@dataclass
class _Response:
    """What an endpoint answers. Logged traces show variables, and an endpoint may repeat the key: not the body."""

    most: int  # bytes
    status: int = 0
    retry_after: str | None = None
    body: bytearray = field(default_factory=bytearray, repr=False)

    def begin(self, head: httpx.Response) -> None:
        self.status, self.retry_after = head.status_code, head.headers.get("Retry-After")

    def collect(self, part: bytes) -> None:
        """Add a part of the body; RequestRejected for a body of more bytes."""
        self.body += part
        if len(self.body) > self.most:
            raise RequestRejected(f"the response has more than {self.most} bytes")


@dataclass
class EndpointClient:
    """
    Ask an endpoint of the OpenAI protocol. What it rejects is final; what may pass is sent again, with growing pauses.

    Redirects are refused: a redirected request would lose its body, and could take the key elsewhere.

    Args:
        key_variable: environment variable of the API key.
        timeout: seconds of one request.
        tries: how often a request is sent that fails in a way that may pass.
        max_bytes: a longer response is rejected, and the rest of it is not read.
        first_pause: seconds before the second try.
        retries_timeouts: whether a request that had no answer in time is sent again.
        alive_since_begin: whether any answer since a request began shows that the endpoint is alive, so that this
            request alone is rejected; else only one since its first failure does.

    Example:

        client = EndpointClient("OPENAI_API_KEY", timeout=60.0, tries=3)
        models = client.ask("https://api.openai.com/v1/models")["data"]
    """

    key_variable: str | None
    timeout: float
    tries: int
    max_bytes: int = MAX_RESPONSE_BYTES
    first_pause: float = FIRST_PAUSE
    retries_timeouts: bool = False
    alive_since_begin: bool = False
    last_success: float = field(default=-1.0, init=False)  # of any request, on the monotonic clock
    _coroutines: httpx.AsyncClient | None = field(default=None, init=False, repr=False)

    def ask(
        self,
        url: str,
        payload: dict[str, Any] | None = None,
        stop: threading.Event | None = None,
        tries: int | None = None,
    ) -> dict[str, Any]:
        """
        Send a request and wait for its answer, from any thread.

        Args:
            url: of the call.
            payload: is posted as JSON; None: the call is a GET.
            stop: set when nobody waits any more; ends the pauses.
            tries: instead of the client's.

        Returns:
            The JSON object that is answered.

        Raises:
            RequestRejected: if the endpoint will not have this request, or failed on it while it answered others.
            EndpointUnavailable: if it answers nothing, or no request can succeed.
        """
        stop = threading.Event() if stop is None else stop
        attempts = _Attempts(self, url, self.tries if tries is None else tries)
        while True:
            try:
                return self._send(attempts.begin(), payload)
            except RetryableError as error:
                if stop.wait(attempts.pause_after(error)):
                    raise attempts.verdict() from error

    async def ask_async(self, url: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Post a request and await its answer; otherwise as `ask`."""
        attempts = _Attempts(self, url, self.tries)
        while True:
            try:
                return await self._send_async(attempts.begin(), payload)
            except RetryableError as error:
                await asyncio.sleep(attempts.pause_after(error))

    async def close(self) -> None:
        """Close the connections of coroutines; the next request opens new ones."""
        if self._coroutines is not None:
            await self._coroutines.aclose()
            self._coroutines = None

    @cached_property
    def _threads(self) -> httpx.Client:
        # each request has its own connection: between two of them a server may be started anew
        return self._open(httpx.Client, httpx.Limits(max_keepalive_connections=0))

    def _open(self, kind: type[Connections], limits: httpx.Limits) -> Connections:
        auth = None if self.key_variable is None else KeyFromEnvironment(self.key_variable)
        timeout = httpx.Timeout(self.timeout, connect=min(CONNECT_SECONDS, self.timeout), pool=None)
        certificates = httpx.create_ssl_context()
        certificates.load_default_certs()  # this system's, beside those that httpx brings
        headers = {"Accept-Encoding": "identity"}  # a compressed body may be far larger than what was sent of it
        try:
            return kind(auth=auth, timeout=timeout, limits=limits, verify=certificates, headers=headers)
        except (ImportError, ValueError) as error:
            raise InputError(f"The proxy that the environment names cannot be used: {error}.") from error

    def _send(self, url: str, payload: dict[str, Any] | None) -> dict[str, Any]:
        end, response = time.monotonic() + self.timeout, _Response(self.max_bytes)
        try:
            with self._threads.stream(**_request(url, payload)) as head:
                response.begin(head)
                for part in head.iter_bytes():
                    response.collect(part)
                    if time.monotonic() > end:
                        raise TimeoutError
        except _TRANSPORT_ERRORS as error:
            raise self._transport_failure(error) from error
        return self._read(url, response)

    async def _send_async(self, url: str, payload: dict[str, Any]) -> dict[str, Any]:
        if self._coroutines is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            self._coroutines = self._open(httpx.AsyncClient, limits)
        connections, response = self._coroutines, _Response(self.max_bytes)

        async def receive() -> None:
            async with connections.stream(**_request(url, payload)) as head:
                response.begin(head)
                async for part in head.aiter_bytes():
                    response.collect(part)

        try:
            await asyncio.wait_for(receive(), self.timeout)
        except _TRANSPORT_ERRORS as error:
            raise self._transport_failure(error) from error
        return self._read(url, response)

    def _transport_failure(self, error: Exception) -> RetryableError:
        is_late = isinstance(error, (TimeoutError, asyncio.TimeoutError, httpx.TimeoutException))
        if is_late and not isinstance(error, httpx.ConnectTimeout):
            return _TimedOut(f"no response in {self.timeout:g} s")
        kind = type(error).__name__
        # of what cannot be sent, the library repeats the header with the key
        is_ours = isinstance(error, httpx.LocalProtocolError)
        words = "" if is_ours else own_words(str(error).encode("utf-8", "replace"), self.key_variable)
        return RetryableError(f"connection failed ({kind}: {words})" if words else f"connection failed ({kind})")

    def _read(self, url: str, response: _Response) -> dict[str, Any]:
        words = own_words(bytes(response.body), self.key_variable)
        check_status(url, response.status, words, response.retry_after)
        answer = parse_object(bytes(response.body))
        self.last_success = time.monotonic()
        return answer


class _Attempts:
    """The tries of one request, and what follows from the failures of all of them."""

    def __init__(self, client: EndpointClient, url: str, tries: int):
        self.client, self.url, self.tries = client, url, tries
        self.failed = 0
        self.reason = ""
        self.begun = self.first_failure = 0.0  # on the monotonic clock

    def begin(self) -> str:
        """Note that a try begins now, and return its address."""
        self.begun = time.monotonic()
        return self.url

    def pause_after(self, error: RetryableError) -> float:
        """Tell the seconds until the next try; RequestRejected or EndpointUnavailable if there is none."""
        is_late = isinstance(error, _TimedOut)
        if self.failed == 0:
            # who is answered while this request has no answer shows that the endpoint is alive
            from_begin = is_late or self.client.alive_since_begin
            self.first_failure = self.begun if from_begin else time.monotonic()
        self.failed += 1
        self.reason = str(error)
        if self.failed == self.tries or (is_late and not self.client.retries_timeouts):
            raise self.verdict() from error
        # a full queue asks for a second again and again: patience is to grow even so
        asked = 0.0 if error.seconds is None else min(error.seconds, LONGEST_PAUSE)
        return max(asked, pause(self.failed - 1, self.client.first_pause))

    def verdict(self) -> Exception:
        """Make the error that ends the request."""
        reason = self.reason + (f" in {self.failed} tries" if self.failed > 1 else "")
        if self.client.last_success >= self.first_failure:
            return RequestRejected(reason)
        return EndpointUnavailable(f"{self.url} gives no answer: {reason}")


# two classes of timeouts on Python 3.10; UnicodeError and InvalidURL: a host that has no form in DNS
_TRANSPORT_ERRORS = (httpx.HTTPError, httpx.InvalidURL, UnicodeError, OSError, asyncio.TimeoutError)


def _request(url: str, payload: dict[str, Any] | None) -> dict[str, Any]:
    """What httpx is given: half a character, which a text may hold, becomes JSON's escape of it."""
    if payload is None:
        return {"method": "GET", "url": url}
    headers = {"Content-Type": "application/json"}
    return {"method": "POST", "url": url, "content": json.dumps(payload).encode(), "headers": headers}
