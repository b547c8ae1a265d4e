"""HTTP requests to a server of the OpenAI protocol, from any thread: bounded and patient, by the standard library."""

import json
import threading
import time
from http.client import HTTPException, HTTPMessage
from typing import IO, Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from fusion_hf.common.endpoints import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    MAX_RESPONSE_BYTES,
    Again,
    Refused,
    Unavailable,
    check_key,
    check_status,
    endpoint_url,
    own_words,
    parse_object,
    pause,
    read_key,
)
from fusion_hf.common.errors import InputError

TRIES = 8  # over half a minute to a minute: as long as a server may take to start anew
SECONDS = 600.0  # of one request: twice what a server of this package gives it
KEY_OPTION = "--api-key-env"


def check_url(url: str) -> str:
    """
    A server's address without a slash at its end.

    Raises:
        InputError: if it is none, or has in it what a record must not show.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of its host or port
        raise InputError("--url is no address; allowed: http://HOST:PORT/v1, or https.") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            "--url has more than scheme, host, port and path; a record would show it. Give a key by --api-key-env."
        )
    if not is_address or not url.isprintable() or " " in url:
        raise InputError(f"--url is {url!r}; allowed: http://HOST:PORT/v1, or https.")
    return url.rstrip("/")


class _TooSlow(Again):
    """No answer within the time of a request."""


class _Failed(NamedTuple):
    """A try that failed, and since when (of the monotonic clock) an answer would have shown that others do not."""

    since: float
    reason: str


class _NoRedirects(HTTPRedirectHandler):
    """A redirected request would lose its body, and could take the key elsewhere."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


class Client:
    """
    Asks one server.

    Args:
        base: its address.
        key_variable: environment variable of the API key.
        tries: how often a request is sent that fails in a way that may pass.
        seconds: for each of them.

    Raises:
        InputError: if the address is none, or the environment has no key.
    """

    def __init__(
        self,
        base: str,
        key_variable: str | None = None,
        tries: int = TRIES,
        seconds: float = SECONDS,
        first_pause: float = FIRST_PAUSE,
    ):
        check_key(key_variable, KEY_OPTION)
        key = "" if key_variable is None else read_key(key_variable)
        if not key.isascii() or not key.isprintable():
            allowed = "printable ASCII characters"
            raise InputError(f"{KEY_OPTION} is {key_variable}, which holds no key; allowed: {allowed}.")
        self.base = check_url(base)
        self.key_variable = key_variable
        self.tries = tries
        self.seconds = seconds
        self.first_pause = first_pause
        self._last_success = -1.0  # of any request, on the monotonic clock
        self._opener = build_opener(_NoRedirects)

    def ask(
        self,
        call: str,
        payload: dict[str, Any] | None = None,
        stop: threading.Event | None = None,
        tries: int | None = None,
    ) -> dict[str, Any]:
        """
        The JSON object that is answered.

        Args:
            call: below the address.
            payload: is posted; None: the call is a GET.
            stop: set when nobody waits any more; ends the pauses.
            tries: None: this client's.

        Raises:
            Refused: if the server will not have this request, or failed on it while it answered others.
            Unavailable: if it answered nothing since the first failure, or no request can succeed.
        """
        stop = threading.Event() if stop is None else stop
        url, most = endpoint_url(self.base, call), self.tries if tries is None else tries
        failures: list[_Failed] = []
        while True:
            begin = time.monotonic()
            try:
                answer = self._try(url, payload)
                self._last_success = time.monotonic()
                return answer
            except _TooSlow as slow:  # once more would take as long
                failures.append(_Failed(begin, str(slow)))
                break
            except Again as again:
                failures.append(_Failed(time.monotonic(), str(again)))
                # a full queue asks for a second again and again: patience is to grow even so
                asked = 0.0 if again.seconds is None else min(again.seconds, LONGEST_PAUSE)
                wait = max(asked, pause(len(failures) - 1, None, self.first_pause))
                if len(failures) == most or stop.wait(wait):
                    break
        reason = failures[-1].reason + (f" in {len(failures)} tries" if len(failures) > 1 else "")
        if self._last_success >= failures[0].since:
            raise Refused(reason)
        raise Unavailable(f"{url} gives no answer: {reason}")

    def _try(self, url: str, payload: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.key_variable is not None:
            headers["Authorization"] = f"Bearer {read_key(self.key_variable)}"
        request = Request(url, None if payload is None else json.dumps(payload).encode(), headers)
        try:
            status, body, retry_after = self._send(request)
        except (OSError, HTTPException, UnicodeError) as error:
            cause = error.reason if isinstance(error, URLError) else error
            if isinstance(cause, TimeoutError):
                raise _TooSlow(f"no response in {self.seconds:g} s") from error
            raise Again(f"connection failed ({_words(cause)})") from error
        words = own_words(body, self.key_variable)
        check_status(url, status, words, retry_after)
        return parse_object(body)

    def _send(self, request: Request) -> tuple[int, bytes, str | None]:
        """Status, body and the header `Retry-After`."""
        try:
            response = self._opener.open(request, timeout=self.seconds)
        except HTTPError as error:  # an answer with another status
            response = error
        with response:
            body = response.read(MAX_RESPONSE_BYTES + 1)
            if len(body) > MAX_RESPONSE_BYTES:
                raise Refused(f"the response has more than {MAX_RESPONSE_BYTES} bytes")
            return response.status, body, response.headers.get("Retry-After")


def _words(cause: object) -> str:
    """What is wrong with a connection."""
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
