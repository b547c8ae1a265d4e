"""What clients of the OpenAI protocol have in common: addresses, keys, which failures may pass, how long to wait."""

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
SHOWN = 300  # characters of an endpoint's own words in a reason
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds; doubled from try to try
TO_RETRY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
TO_STOP = frozenset({401, 402, 403, 404})  # what no other request would fare better with


class RequestRejected(Exception):
    """The endpoint will not answer this request; others may fare better."""


class EndpointUnavailable(Exception):
    """The endpoint answers nobody: the run has to be given again."""


class RetryableError(Exception):
    """
    A failure that may pass.

    Attributes:
        seconds: how long the endpoint asks to wait.
    """

    def __init__(self, reason: str, seconds: float | None = None):
        super().__init__(reason)
        self.seconds = seconds


def read_key(variable: str) -> str:
    """Read the API key: when a request is sent, so that it is in no object that is pickled, logged or shown."""
    return os.environ.get(variable, "").strip()


def check_key(variable: str | None, named_by: str = "key_variable") -> None:
    """
    Look for the API key before a run begins.

    Args:
        variable: the environment variable that holds it; None: there is none.
        named_by: the setting that names the variable, for the error.

    Raises:
        InputError: if the environment has no such variable, or its value cannot stand in a header.
    """
    if variable is None:
        return
    key = read_key(variable)
    if not key:
        raise InputError(f"The environment has no {variable}, which {named_by} names; set it to the API key.")
    if not key.isascii() or not key.isprintable():
        raise InputError(f"{named_by} is {variable}, which holds no key; allowed: printable ASCII characters.")


def check_url(url: str, key_setting: str) -> str:
    """
    Check an endpoint's address and take the slash at its end away.

    Args:
        key_setting: where a key is given instead, for the error.

    Raises:
        ValueError: if it is none, or has in it what a record must not show; a sentence on `url`.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of its host or port
        raise ValueError("url is no address; allowed: http://HOST:PORT/v1, or https.") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            f"url has more than scheme, host, port and path; a record would show it. Give a key by {key_setting}."
        )
    if not is_address or not url.isprintable() or " " in url:
        raise ValueError(f"url is {short_name(repr(url))}; allowed: http://HOST:PORT/v1, or https.")
    return url.rstrip("/")


def data_uri(content: bytes, kind: str) -> str:
    """Write an image file, of a kind such as `image/png`, as the protocol takes it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def endpoint_url(base: str, call: str) -> str:
    """Make the address of a call: a base without a path gets `/v1`."""
    base = base.rstrip("/")
    return f"{base if urlsplit(base).path else base + DEFAULT_PATH}/{call}"


def pause(failures: int, first: float = FIRST_PAUSE) -> float:
    """Draw the seconds to wait after more than `failures` failures, doubled from one to the next."""
    # apart from each other, or all who failed together come back together
    return min(first * 2**failures, LONGEST_PAUSE) * random.uniform(0.5, 1.0)


def seconds_asked(retry_after: str | None) -> float | None:
    """Read a header `Retry-After`; None where it gives no seconds."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else None


def check_status(url: str, status: int, words: str, retry_after: str | None) -> None:
    """
    Raise what follows from a status: what may pass, what is final for a request, what is final for all.

    Args:
        words: what the endpoint says, from `own_words`. Not the body: a logged traceback may show all arguments, and
            an endpoint may repeat the key.

    Raises:
        RetryableError, RequestRejected, EndpointUnavailable: for every status but 200.
    """
    if status in TO_RETRY:
        raise RetryableError(f"HTTP {status}", seconds_asked(retry_after))
    if status in TO_STOP:
        raise EndpointUnavailable(f"{url} answers HTTP {status} {HTTPStatus(status).phrase}: {words}")
    if status != HTTPStatus.OK:
        raise RequestRejected(f"HTTP {status}: {words}")


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a response, which must be a JSON object.

    Raises:
        RetryableError: if it is none.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RetryableError("the response is no JSON") from error
    if not isinstance(answer, dict):
        raise RetryableError("the response is no JSON object")
    return answer


def own_words(body: bytes, key_variable: str | None) -> str:
    """Quote what an endpoint says, in one line without control characters, not at any length, and without our key."""
    text = " ".join(body[: 4 * SHOWN].decode("utf-8", "replace").split())
    key = "" if key_variable is None else read_key(key_variable)
    text = text.replace(key, "<key>") if key else text
    return "".join(letter for letter in text if letter.isprintable())[:SHOWN]
