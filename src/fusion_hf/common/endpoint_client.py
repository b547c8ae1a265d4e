"""A client of the OpenAI protocol for threads and coroutines. It limits responses, retries calls, and hides keys."""

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
    """Reads the API key when a request is sent, so that no object that is pickled, logged or shown contains it."""

    def __init__(self, variable: str):
        self.variable = variable

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {read_key(self.variable)}"
        yield request


class _TimedOut(RetryableError):
    """A request had no answer in time."""


@dataclass
class _Response:
    """An endpoint's response. Its body is hidden, because logged traces show variables and it may repeat the key."""

    most: int  # bytes
    status: int = 0
    retry_after: str | None = None
    body: bytearray = field(default_factory=bytearray, repr=False)

    def begin(self, head: httpx.Response) -> None:
        self.status, self.retry_after = head.status_code, head.headers.get("Retry-After")

    def collect(self, part: bytes) -> None:
        """Append a part of the body. Raise `RequestRejected` if the body becomes too large."""
        self.body += part
        if len(self.body) > self.most:
            raise RequestRejected(f"the response has more than {self.most} bytes")


@dataclass
class EndpointClient:
    """
    Client for endpoints of the OpenAI protocol. Failures that may be temporary are retried, with growing pauses.

    Redirects are refused, because a redirected request would lose its body and could take the key elsewhere.

    Args:
        key_variable: Environment variable with the API key.
        timeout: Maximum duration of one request in seconds.
        tries: Maximum number of times that a request with a temporary failure is sent.
        max_bytes: Maximum size of a response. Larger responses are rejected, and the rest is not read.
        first_pause: Seconds before the second try.
        retries_timeouts: Whether to send a request again that had no answer in time.
        alive_since_begin: Whether any answer since the beginning of a request shows that the endpoint is alive, so
            that only this request is rejected. By default, only an answer since its first failure does.

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
    last_success: float = field(default=-1.0, init=False)  # time of any successful request on the monotonic clock
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
            url: URL of the call.
            payload: Content that is posted as JSON. None sends a GET request.
            stop: Event that ends the pauses, set when nobody waits for the answer any more.
            tries: Number of tries. Defaults to that of the client.

        Returns:
            The JSON object that the endpoint answers.

        Raises:
            RequestRejected: If the endpoint refuses this request, or fails on it while it answers others.
            EndpointUnavailable: If the endpoint does not answer, or if no request can succeed.
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
        """
        Post a request and await its answer.

        Args:
            url: URL of the call.
            payload: Content that is posted as JSON.

        Returns:
            The JSON object that the endpoint answers.

        Raises:
            RequestRejected, EndpointUnavailable: See `ask`.
        """
        attempts = _Attempts(self, url, self.tries)
        while True:
            try:
                return await self._send_async(attempts.begin(), payload)
            except RetryableError as error:
                await asyncio.sleep(attempts.pause_after(error))

    async def close(self) -> None:
        """Close the connections of coroutines. The next request opens new ones."""
        if self._coroutines is not None:
            await self._coroutines.aclose()
            self._coroutines = None

    @cached_property
    def _threads(self) -> httpx.Client:
        # each request has its own connection, because a server may restart between two requests
        return self._open(httpx.Client, httpx.Limits(max_keepalive_connections=0))

    def _open(self, kind: type[Connections], limits: httpx.Limits) -> Connections:
        auth = None if self.key_variable is None else KeyFromEnvironment(self.key_variable)
        timeout = httpx.Timeout(self.timeout, connect=min(CONNECT_SECONDS, self.timeout), pool=None)
        certificates = httpx.create_ssl_context()
        certificates.load_default_certs()  # those of the system, besides those that httpx provides
        headers = {"Accept-Encoding": "identity"}  # a compressed body may expand to far more than was sent
        try:
            return kind(auth=auth, timeout=timeout, limits=limits, verify=certificates, headers=headers)
        except (ImportError, ValueError) as error:
            raise InputError(f"The proxy in the environment variables cannot be used: {error}.") from error

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
        # if a request cannot be sent, the library's message repeats the header with the key
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
    """The tries of one request and the consequence of their failures."""

    def __init__(self, client: EndpointClient, url: str, tries: int):
        self.client, self.url, self.tries = client, url, tries
        self.failed = 0
        self.reason = ""
        self.begun = self.first_failure = 0.0  # on the monotonic clock

    def begin(self) -> str:
        """Note that a try begins now, and return its URL."""
        self.begun = time.monotonic()
        return self.url

    def pause_after(self, error: RetryableError) -> float:
        """Return the seconds until the next try. Raise `RequestRejected` or `EndpointUnavailable` if there is none."""
        is_late = isinstance(error, _TimedOut)
        if self.failed == 0:
            # an answer to any request while this one waits shows that the endpoint is alive
            from_begin = is_late or self.client.alive_since_begin
            self.first_failure = self.begun if from_begin else time.monotonic()
        self.failed += 1
        self.reason = str(error)
        if self.failed == self.tries or (is_late and not self.client.retries_timeouts):
            raise self.verdict() from error
        # a full queue asks for one second again and again, but the pauses should grow anyway
        asked = 0.0 if error.seconds is None else min(error.seconds, LONGEST_PAUSE)
        return max(asked, pause(self.failed - 1, self.client.first_pause))

    def verdict(self) -> Exception:
        """Create the error that ends the request."""
        reason = self.reason + (f" in {self.failed} tries" if self.failed > 1 else "")
        if self.client.last_success >= self.first_failure:
            return RequestRejected(reason)
        return EndpointUnavailable(f"{self.url} does not answer: {reason}")


# Python 3.10 has two classes of timeouts. UnicodeError and InvalidURL are raised for host names that DNS cannot
# encode.
_TRANSPORT_ERRORS = (httpx.HTTPError, httpx.InvalidURL, UnicodeError, OSError, asyncio.TimeoutError)


def _request(url: str, payload: dict[str, Any] | None) -> dict[str, Any]:
    """Build the arguments for httpx. Lone surrogates, which a text may contain, become JSON escapes."""
    if payload is None:
        return {"method": "GET", "url": url}
    headers = {"Content-Type": "application/json"}
    return {"method": "POST", "url": url, "content": json.dumps(payload).encode(), "headers": headers}
