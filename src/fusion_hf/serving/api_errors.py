"""Errors of the server in the format of OpenAI's API. This module imports nothing heavy."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusion_hf.common.errors import short_name

BAD_REQUEST, UNAUTHORIZED, NOT_FOUND, TIMEOUT, TOO_LARGE, UNSUPPORTED_TYPE = 400, 401, 404, 408, 413, 415
TOO_MANY, INTERNAL, OVERLOADED = 429, 500, 503
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
# some clients use OpenAI's Responses API by default
CHAT_ADVICE = "Set your client to chat completions (openai-agents: `set_default_openai_api('chat_completions')`)."
RETRY_SECONDS = 1  # when a rejected client may try again


@dataclass(eq=False)
class ApiError(Exception):
    """
    An error that the server returns to a client.

    Args:
        status: the HTTP status.
        message: the message for people.
        param: the field of the request that is wrong.
        code: the code for programs.
        headers: further headers of the reply.
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
        """The JSON body of the reply."""
        kinds = {TOO_MANY: "rate_limit_error", UNAUTHORIZED: "authentication_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= INTERNAL else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong_value(param: str, value: object, allowed: str, code: str | None = None) -> ApiError:
    """
    Make the error of a field with an invalid value. Long names and values are shortened.

    Args:
        param: the name of the field.
        value: its value.
        allowed: what the field must be, as the end of the phrase "must be ...".
        code: the code for programs.
    """
    param = short_name(param)
    return ApiError(BAD_REQUEST, f"`{param}` must be {allowed}, got {reprlib.repr(value)}.", param, code)


def overloaded(message: str, status: int = OVERLOADED) -> ApiError:
    """
    Make the error of a request that may be sent again soon.

    Args:
        message: the message for people.
        status: the HTTP status.
    """
    return ApiError(status, message, code="overloaded", headers={"Retry-After": str(RETRY_SECONDS)})


def no_such_path(method: str, path: str, allowed: str) -> ApiError:
    """
    Make the error of a path that the server does not have. For OpenAI's Responses API, it says what to use instead.

    Args:
        method: the HTTP method.
        path: the path in the request. Long ones are shortened.
        allowed: the methods and paths that the server has.
    """
    message = f"The request must be one of {allowed}, got {short_name(method)} {short_name(path)!r}."
    advice = f" {CHAT_ADVICE}" if path.rstrip("/") == RESPONSES else ""
    return ApiError(NOT_FOUND, message + advice, code="unknown_url")
