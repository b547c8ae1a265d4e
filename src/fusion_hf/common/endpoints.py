"""Common parts of clients of the OpenAI protocol: URLs, keys, temporary failures, and pauses between tries."""

import base64
import json
import os
import random
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from fusion_hf.common.errors import InputError, short_name

DEFAULT_PATH = "/v1"
CHAT, IMAGES, MODELS = "chat/completions", "images/generations", "models"
MAX_RESPONSE_BYTES = 2**22
SHOWN = 300  # characters of an endpoint's message in a reason
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds; doubled from try to try
TO_RETRY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
TO_STOP = frozenset({401, 402, 403, 404})  # statuses that any other request would get as well


class RequestRejected(Exception):
    """The endpoint rejects this request. Other requests may succeed."""


class EndpointUnavailable(Exception):
    """The endpoint answers no request, so the run must be started again."""


class RetryableError(Exception):
    """
    A failure that may be temporary.

    Attributes:
        seconds: Seconds that the endpoint asks you to wait.
    """

    def __init__(self, reason: str, seconds: float | None = None):
        super().__init__(reason)
        self.seconds = seconds


def read_key(variable: str) -> str:
    """Read the API key. Call it when a request is sent, so that no object that is logged or shown contains the key."""
    return os.environ.get(variable, "").strip()


def check_key(variable: str | None, named_by: str = "key_variable") -> None:
    """
    Check that the API key is set before a run begins.

    Args:
        variable: Environment variable with the key. None means that there is no key.
        named_by: Setting that names the variable, for errors.

    Raises:
        InputError: If the variable is not set, or if its value cannot be sent in a header.
    """
    if variable is None:
        return
    key = read_key(variable)
    if not key:
        raise InputError(f"The environment variable {variable} ({named_by}) is not set. Set it to the API key.")
    if not key.isascii() or not key.isprintable():
        raise InputError(f"The environment variable {variable} ({named_by}) must be printable ASCII characters.")


def check_url(url: str, key_setting: str) -> str:
    """
    Check the URL of an endpoint and remove the slash at its end.

    Args:
        url: URL of the endpoint.
        key_setting: Setting for the API key, for errors.

    Returns:
        The URL without a slash at its end.

    Raises:
        ValueError: If the URL is invalid, or contains something that a record must not show.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of its host or port
        raise ValueError("url must be an http(s) URL such as http://HOST:PORT/v1, got an invalid URL.") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            f"url must have only a scheme, host, port and path, because records show it. Pass a key by {key_setting}."
        )
    if not is_address or not url.isprintable() or " " in url:
        raise ValueError(f"url must be an http(s) URL such as http://HOST:PORT/v1, got {short_name(repr(url))}.")
    return url.rstrip("/")


def data_uri(content: bytes, kind: str) -> str:
    """
    Encode an image file as a data URI.

    Args:
        content: Content of the file.
        kind: Media type, such as `image/png`.

    Returns:
        The data URI.
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def endpoint_url(base: str, call: str) -> str:
    """Return the URL of a call. A base without a path gets `/v1`."""
    base = base.rstrip("/")
    return f"{base if urlsplit(base).path else base + DEFAULT_PATH}/{call}"


def pause(failures: int, first: float = FIRST_PAUSE) -> float:
    """Draw the seconds to wait after `failures` earlier failures. The pause doubles from one failure to the next."""
    # random pauses, so that requests that failed together do not return together
    return min(first * 2**failures, LONGEST_PAUSE) * random.uniform(0.5, 1.0)


def seconds_asked(retry_after: str | None) -> float | None:
    """Read the header `Retry-After`. Return None if it gives no seconds."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else None


def check_status(url: str, status: int, words: str, retry_after: str | None) -> None:
    """
    Raise the error that follows from an HTTP status.

    Args:
        url: URL of the call.
        status: HTTP status.
        words: Message of the endpoint, from `own_words`. The body is not passed, because a logged traceback may show
            all arguments, and an endpoint may repeat the key.
        retry_after: Value of the header `Retry-After`.

    Raises:
        RetryableError: If the failure may be temporary.
        RequestRejected: If the failure is final for this request.
        EndpointUnavailable: If the failure is final for all requests.
    """
    if status in TO_RETRY:
        raise RetryableError(f"HTTP {status}", seconds_asked(retry_after))
    if status in TO_STOP:
        raise EndpointUnavailable(f"{url} answers HTTP {status} {HTTPStatus(status).phrase}: {words}")
    if status != HTTPStatus.OK:
        raise RequestRejected(f"HTTP {status}: {words}")


def parse_object(body: bytes) -> dict[str, Any]:
    """
    Parse a response, which must be a JSON object.

    Args:
        body: Body of the response.

    Raises:
        RetryableError: If the body is not a JSON object.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RetryableError("the response is not JSON") from error
    if not isinstance(answer, dict):
        raise RetryableError("the response is not a JSON object")
    return answer


def own_words(body: bytes, key_variable: str | None) -> str:
    """
    Quote an endpoint's message in one short line, without control characters and without the API key.

    Args:
        body: Body of the response.
        key_variable: Environment variable with the API key, if there is one.

    Returns:
        The message.
    """
    text = " ".join(body[: 4 * SHOWN].decode("utf-8", "replace").split())
    key = "" if key_variable is None else read_key(key_variable)
    text = text.replace(key, "<key>") if key else text
    return "".join(letter for letter in text if letter.isprintable())[:SHOWN]
