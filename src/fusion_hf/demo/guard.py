"""What stands between the network and the page: bounds on requests, and no addresses in the place of uploads."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fusion_hf.common.values import is_address

MAX_JSON_BYTES = 2**20
FORM = b"multipart/form-data"  # what a browser sends a file in

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class RequestGuard:
    """
    An ASGI middleware. Refused are: a body without a length (411), a longer body than `max_upload_bytes` for a form or
    MAX_JSON_BYTES for anything else (413), and JSON in which a file's path is an http(s) address (422): gradio would
    fetch it.
    """

    def __init__(self, app: App, max_upload_bytes: int):
        self.app = app
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_form = headers.get(b"content-type", b"").startswith(FORM)
        most = self.max_upload_bytes if is_form else MAX_JSON_BYTES
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            await _refuse(send, 411, "The request has no length.")
        elif int(length) > most:
            await _refuse(send, 413, f"The request has {int(length)} bytes; allowed: {most}.")
        elif is_form:
            await self.app(scope, receive, send)
        else:
            body = await _read(receive)
            if _names_address(body):
                await _refuse(send, 422, "An image is an address; allowed: an uploaded file.")
            else:
                await self.app(scope, _replay(body, receive), send)


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": reason}).encode()})


async def _read(receive: Receive) -> bytes:
    """The whole body; the server sees to it that it is no longer than announced."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """What gives the body again, then whatever comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _names_address(body: bytes) -> bool:
    """Whether a `path` anywhere in this JSON is an http(s) address; what is no JSON has none."""
    try:
        values = [json.loads(body)]
    except (ValueError, RecursionError):
        return False
    while values:
        value = values.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and is_address(path):
                return True
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
    return False
