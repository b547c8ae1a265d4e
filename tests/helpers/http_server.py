"""Servers on the loopback interface that do what a test tells them."""

import json
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

HERE = "127.0.0.1"
POLL_SECONDS = 0.02

Self = TypeVar("Self", bound="HttpServer")


@dataclass(frozen=True)
class Request:
    """What a client asked. `path` is as it was sent: with its query, and to a proxy with its host."""

    method: str
    path: str
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Response:
    """
    What a client is answered.

    Attributes:
        body: bytes, or pieces that are sent as they come, without a length.
        closes: the connection ends with it.
    """

    body: bytes | Iterable[bytes] = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    closes: bool = False

    @classmethod
    def json(cls, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> "Response":
        return cls(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})


# `None`: the connection ends without an answer
Respond = Callable[[Request], Response | None]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: "HttpServer"

    def log_message(self, *args: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        request = Request(self.command, self.path, self.headers, self._read())
        self.owner.requests.append(request)
        response = self.owner.respond(request)
        if response is None:
            self.close_connection = True
            return
        try:
            self._send(response)
        except OSError:  # the client has gone
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _send(self, response: Response) -> None:
        is_whole = isinstance(response.body, bytes)
        length = {"Content-Length": str(len(response.body))} if is_whole else {}
        self.send_response(response.status)
        for name, value in (length | response.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for piece in [response.body] if is_whole else response.body:
                self.wfile.write(piece)
        self.close_connection = self.close_connection or response.closes


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed, or that trusts no certificate, is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class HttpServer:
    """
    Answers by a function until the `with` block ends.

    Attributes:
        requests: all that was asked, in this order.
    """

    def __init__(self, respond: Respond, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.respond = respond
        self.requests: list[Request] = []
        self._server = _Server((HERE, port), type("Handler", (_Handler,), {"owner": self}))
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_SECONDS,), daemon=True)
        self.port = self._server.server_port
        self.url = f"{'http' if tls is None else 'https'}://{HERE}:{self.port}"

    def __enter__(self: Self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serve_connections(serve: Callable[[socket.socket, threading.Event], None]) -> Iterator[int]:
    """The port of a server that treats each connection so, below HTTP; the event says that the block has ended."""
    stop = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                serve(connection, stop)
            except OSError:
                return  # the client has gone

    def accept() -> None:
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server((HERE, 0)) as listener:
        listener.settimeout(0.1)
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stop.set()
            thread.join()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server((HERE, 0)) as listener:
        return listener.getsockname()[1]
