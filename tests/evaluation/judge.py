"""A judge on this machine: a server of OpenAI's protocol."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Judge(BaseHTTPRequestHandler):
    """Says of every answer what each benchmark's scoring takes for a good mark."""

    VERDICTS = (
        ("Correctness", "1.0"),
        ("Extracted answer", "A"),
        ("Reference answer", "correct"),
        ("[System]", "8 8"),
        ("the word yes", "yes"),
    )

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(request["model"], request["messages"][0]["content"])

    def reply(self, model: str, prompt: str) -> None:
        verdict = next(verdict for mark, verdict in self.VERDICTS if mark in prompt)
        self.send(200, json.dumps({"model": model, "choices": [{"message": {"content": verdict}}]}))

    def send(self, status: int, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Mortal(Judge):
    """Answers nothing but the first word."""

    def reply(self, model: str, prompt: str) -> None:
        if "the word yes" in prompt:
            super().reply(model, prompt)
        else:
            self.send(500, "out of order")


class Babbler(Judge):
    """Does not speak the protocol."""

    def reply(self, model: str, prompt: str) -> None:
        self.send(200, "<html>hello</html>")


@contextmanager
def serving(handler: type[Judge]) -> Iterator[str]:
    """The address of a server, as OPENAI_API_URL has it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
