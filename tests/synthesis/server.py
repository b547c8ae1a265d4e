"""A scripted server on the loopback interface that speaks the OpenAI protocol, well or badly, as a test tells it."""

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

from PIL import Image

CHAT, IMAGES = "/v1/chat/completions", "/v1/images/generations"
TOKENS = 7  # of each answer
GARBAGE = '{"turns": [{"question": "Wh'

Payload = dict[str, Any]
# the text of an answer to a prompt, which may be the blocks of a message; or what a bad server has in its place
Writer = Callable[[Payload], str | None]
# what goes wrong with a request: its payload, and how often the same one has come before
Script = Callable[[Payload, int], str | None]


def prompt_of(payload: Payload) -> str:
    """The text of the last message."""
    content = payload["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)


def draw_number(payload: Payload, below: int) -> int:
    """A number that follows from the request alone."""
    return int(hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest(), 16) % below


@dataclass
class Scripted:
    """
    What a server is told, and what it was asked.

    Attributes:
        faults: `slow`, `invalid` (no JSON of the schema), `cut` (unfinished), `drop` (the connection), `half` (drops
            within the response), `huge`, or an HTTP status as text, with `Retry-After` if it ends in `!`.
    """

    writer: Writer
    faults: Script = lambda payload, repeat: None
    key: str | None = None
    models: list[Payload] = field(default_factory=list)
    fingerprint: str | None = None
    seconds: float = 0.0
    slow_seconds: float = 0.5
    requests: list[Payload] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    repeats: Counter[str] = field(default_factory=Counter)
    guard: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def note(self, payload: Payload) -> int:
        """How often the same request has come before."""
        name = json.dumps(payload, sort_keys=True)
        with self.guard:
            self.requests.append(payload)
            self.repeats[name] += 1
            return self.repeats[name] - 1

    def note_answer(self, payload: Payload) -> None:
        with self.guard:
            self.answered[json.dumps(payload, sort_keys=True)] += 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Scripted

    def log_message(self, *args: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        """Any address answers: who waits for the server to be ready asks for its models, without a key."""
        if not self.script.models or self._is_known():
            self._send(200, {"data": self.script.models})

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        script = self.script
        if not self._is_known():
            return None
        time.sleep(script.seconds)
        fault = script.faults(payload, script.note(payload)) or ""
        if fault == "slow":
            time.sleep(script.slow_seconds)
        if fault == "drop":
            self.close_connection = True
            return None
        if fault.rstrip("!").isdecimal():
            headers = {"Retry-After": "0"} if fault.endswith("!") else {}
            return self._send(int(fault.rstrip("!")), {"error": {"message": "as the script says"}}, headers)
        if fault == "huge":
            return self._send(200, {"junk": "x" * 2**23})
        return self._answer(payload, fault)

    def _is_known(self) -> bool:
        """Whether the client has the key; if not, it is told so."""
        said = self.headers.get("Authorization", "nothing")
        if self.script.key is None or said == f"Bearer {self.script.key}":
            return True
        self._send(401, {"error": {"message": f"Incorrect API key provided: {said}"}})
        return False

    def _answer(self, payload: Payload, fault: str) -> None:
        if self.path == IMAGES:
            answer: Payload = {"data": [{"b64_json": base64.b64encode(draw_picture(payload)).decode()}]}
        elif self.path == CHAT:
            text = GARBAGE if fault == "invalid" else self.script.writer(payload)
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            choice["finish_reason"] = "length" if fault == "cut" else "stop"
            usage = {"prompt_tokens": len(prompt_of(payload).split()), "completion_tokens": TOKENS}
            answer = {"choices": [choice], "usage": usage, "system_fingerprint": self.script.fingerprint}
        else:
            return self._send(404, {"error": {"message": f"there is no {self.path}"}})
        self._send(200, answer, half=fault == "half")
        if fault != "half":
            self.script.note_answer(payload)
        return None

    def _send(self, status: int, content: Payload, headers: dict[str, str] | None = None, half: bool = False) -> None:
        body = json.dumps(content).encode()
        with suppress(ConnectionError):  # the client was killed
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if half else body)
            self.wfile.flush()
        self.close_connection = self.close_connection or half


def draw_picture(payload: Payload) -> bytes:
    """A PNG whose two colours follow from the request."""
    width, height = (int(side) for side in payload["size"].split("x"))
    number = draw_number(payload, 2**24)
    picture = Image.new("RGB", (width, height), (number % 256, number // 256 % 256, number // 65536))
    picture.putpixel((0, 0), (255 - number % 256, 0, 0))
    stream = BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error."""


@contextmanager
def serve(script: Scripted, port: int = 0) -> Iterator[Scripted]:
    """Serve what the script says, at its `url`; without a port, at a free one."""
    handler = type("Handler", (_Handler,), {"script": script})
    server = _Server(("127.0.0.1", port), handler)
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
