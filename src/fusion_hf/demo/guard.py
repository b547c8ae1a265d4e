"""What stands between the network and the page: bounds on requests, and no addresses in the place of uploads."""

import json
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fusion_hf.common.user_values import is_address
from fusion_hf.serving.app import replay

MAX_JSON_BYTES = 2**20
FORM = b"multipart/form-data"  # what a browser sends a file in


class RequestGuard:
    """
    An ASGI middleware. Refused are: a body without a length (411), a longer body than `max_upload_bytes` for a form or
    MAX_JSON_BYTES for anything else (413), and JSON in which a file's path is an http(s) address (422): gradio would
    fetch it.
    """

    def __init__(self, app: ASGIApp, max_upload_bytes: int):
        self.app = app
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_form = headers.get(b"content-type", b"").startswith(FORM)
        most = self.max_upload_bytes if is_form else MAX_JSON_BYTES
        length = headers.get(b"content-length", b"")
        answer: ASGIApp = self.app
        if not length.isdigit():
            answer = _refusal(411, "The request has no length.")
        elif int(length) > most:
            answer = _refusal(413, f"The request has {int(length)} bytes; allowed: {most}.")
        elif not is_form:
            try:  # the server sees to it that the body is no longer than announced
                body = await Request(scope, receive).body()
            except ClientDisconnect:
                return
            receive = replay(body, receive)
            if _names_address(body):
                answer = _refusal(422, "An image is an address; allowed: an uploaded file.")
        await answer(scope, receive, send)


def _refusal(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"detail": reason}, status)


def _names_address(body: bytes) -> bool:
    """Whether a `path` anywhere in this JSON is an http(s) address; what is no JSON has none."""
    paths: list[Any] = []
    try:
        json.loads(body, object_hook=lambda content: paths.append(content.get("path")))
    except (ValueError, RecursionError):
        return False
    return any(isinstance(path, str) and is_address(path) for path in paths)
