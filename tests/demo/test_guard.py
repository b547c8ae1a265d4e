"""The guard before the page, without a server."""

import asyncio
import json
from typing import Any

import pytest

from fusion_hf.demo.guard import MAX_JSON_BYTES, RequestGuard

MOST = 2 * MAX_JSON_BYTES
FORM = "multipart/form-data; boundary=x"
JSON = "application/json"


def send_request(body: bytes, kind: str = JSON, length: int | None = None, method: str = "POST") -> tuple[int, bytes]:
    """The status, and the body that the page got (nothing if it was not reached)."""
    reached, sent = [], []
    middle = len(body) // 2
    parts = [(body[:middle], True), (body[middle:], False)]
    messages = [{"type": "http.request", "body": part, "more_body": more} for part, more in parts]
    headers = [(b"content-type", kind.encode())]
    if length != -1:
        headers.append((b"content-length", str(len(body) if length is None else length).encode()))

    async def page(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            reached.append(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "headers": headers}
    asyncio.run(RequestGuard(page, MOST)(scope, receive, send))
    return sent[0]["status"], b"".join(reached)


def upload(path: str) -> bytes:
    return json.dumps({"data": [{"path": path, "url": "http://127.0.0.1:7860/file=x"}, None], "fn_index": 0}).encode()


@pytest.mark.parametrize(
    ("body", "kind"), [(upload("/tmp/x.png"), JSON), (b"x" * MOST, FORM), (b"{", JSON), (b"[3]", "")]
)
def test_let_through_unchanged(body, kind):
    assert send_request(body, kind) == (200, body)


@pytest.mark.parametrize("address", ["http://127.0.0.1/x.png", "https://example.org/x.png", "HTTP://example.org"])
@pytest.mark.parametrize("kind", [JSON, "text/plain", ""])
def test_an_address_is_no_upload(address, kind):
    assert send_request(upload(address), kind) == (422, b"")


@pytest.mark.parametrize(
    ("kind", "length", "status"),
    [
        (FORM, MOST + 1, 413),
        (JSON, MAX_JSON_BYTES + 1, 413),
        ("", MAX_JSON_BYTES + 1, 413),
        (FORM, -1, 411),
        (JSON, -1, 411),
    ],
)
def test_bounds(kind, length, status):
    assert send_request(b"{}", kind, length) == (status, b"")


def test_nothing_is_asked_of_requests_without_a_body():
    assert send_request(b"", "", -1, "GET") == (200, b"")


def test_deep_nesting_is_left_to_the_page():
    body = b"[" * 100_000
    assert send_request(body) == (200, body)
