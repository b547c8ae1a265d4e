"""Errors of the server, as OpenAI's clients read them. Imports nothing heavy."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusion_hf.common.errors import short_name

BAD_REQUEST, UNAUTHORIZED, NOT_FOUND, TIMEOUT, TOO_LARGE, UNSUPPORTED_TYPE = 400, 401, 404, 408, 413, 415
TOO_MANY, INTERNAL, OVERLOADED = 429, 500, 503
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
# some clients speak OpenAI's newer protocol unless they are told otherwise
CHAT_ADVICE = "Set your client to chat completions; openai-agents: `set_default_openai_api('chat_completions')`."
RETRY_SECONDS = 1  # what a client that is sent away is told to wait


@dataclass(eq=False)
class ApiError(Exception):
    """
    What a client is told instead of an answer.

    Args:
        status: of HTTP.
        message: for a person.
        param: the field of the request that is wrong.
        code: for a program.
        headers: of the reply.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def content(self) -> dict[str, Any]:
        """The reply's JSON."""
        kinds = {TOO_MANY: "rate_limit_error", UNAUTHORIZED: "authentication_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= INTERNAL else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong_value(param: str, value: object, allowed: str, code: str | None = None) -> ApiError:
    """Return the error of a field's value; a long one is repeated in part, and so is a long name."""
    param = short_name(param)
    return ApiError(BAD_REQUEST, f"{param} is {reprlib.repr(value)}; allowed: {allowed}.", param, code)


def overloaded(message: str, status: int = OVERLOADED) -> ApiError:
    """Return the error of a request that may be sent again soon."""
    return ApiError(status, message, code="overloaded", headers={"Retry-After": str(RETRY_SECONDS)})


def no_such_path(method: str, path: str, allowed: str) -> ApiError:
    """Make the error of a path that a server does not have.

    Args:
        method: Of HTTP.
        path: What a client asked for; a long one is repeated in part.
        allowed: The methods and paths that there are.

    Returns:
        The error. That of OpenAI's Responses API says what to use instead.
    """
    message = f"There is no {short_name(method)} {short_name(path)!r} here; allowed: {allowed}."
    advice = f" {CHAT_ADVICE}" if path.rstrip("/") == RESPONSES else ""
    return ApiError(NOT_FOUND, message + advice, code="unknown_url")
