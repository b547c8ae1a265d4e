"""Servers as users start them, images for them, and a stand-in for hosts that have images."""

import base64
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import openai
from tests.helpers.http_server import HttpServer, Request, Response

ROOT = Path(__file__).parents[2]
IMAGE_FILE = ROOT / "docs" / "assets" / "red_circle.png"
QUESTION = "what color is the shape?"
MODEL = "fusion-nano"
SECONDS = 120  # a hung server fails its test
STOP_SECONDS = 30
POLL_SECONDS = 0.01
ENDLESS_CHUNKS = 200  # of the stand-in's endless image: more than anybody should read
CHUNK = 2**16


@dataclass(frozen=True)
class Server:
    """A running server: its address, its process, and where it writes errors."""

    url: str
    pid: int
    errors: Path

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def rss(self) -> int:
        """Bytes of memory in use now (Linux)."""
        return rss_of(self.pid)

    def children(self) -> list[int]:
        """Processes that the server has started and that are there (Linux)."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended meanwhile
                if int(path.read_text().rpartition(")")[2].split()[1]) == self.pid:
                    found.append(int(path.parent.name))
        return found

    def send(self, content: bytes, then_end: bool = False) -> bytes:
        """What is answered to raw bytes; nothing, if the server closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS) as connection:
            connection.sendall(content)
            if then_end:
                connection.shutdown(socket.SHUT_WR)
            return receive(connection)

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/health") as reply:
            return json.load(reply)

    def wait_for(self, **expected: int) -> None:
        """Until so many requests run or wait."""
        end = time.monotonic() + STOP_SECONDS
        while {name: self.health()[name] for name in expected} != expected:
            assert time.monotonic() < end, f"{self.health()} is not {expected}"
            time.sleep(POLL_SECONDS)


def rss_of(pid: int) -> int:
    """Bytes of memory that a process uses now (Linux); 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def receive(connection: socket.socket) -> bytes:
    """A whole answer; nothing, if the server closes the connection."""
    answer = b""
    while not is_whole(answer) and (part := connection.recv(CHUNK)):
        answer += part
    return answer


def is_whole(answer: bytes) -> bool:
    """Whether it is all of an HTTP answer with a declared length."""
    head, separator, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)^content-length: (\d+)", head, re.MULTILINE)
    return bool(separator) and length is not None and len(body) >= int(length[1])


@contextmanager
def start_server(*arguments: object, errors: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[str], Server]]:
    """`python -m fusion_hf serve` on a free port of the loopback interface."""
    command = [sys.executable, "-m", "fusion_hf", "serve", "--port", "0", "--device", "cpu", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    with errors.open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, encoding="utf-8"
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("http://"), errors.read_text(encoding="utf-8")
        yield process, Server(line.split()[0], process.pid, errors)
    finally:
        process.terminate()
        process.wait(STOP_SECONDS)
        process.stdout.close()


@contextmanager
def run_server(*arguments: object, **variables: str) -> Iterator[Server]:
    """A server that lives as long as it is needed."""
    with (
        tempfile.TemporaryDirectory() as folder,
        start_server(*arguments, errors=Path(folder) / "errors", **variables) as (process, server),
    ):
        yield server
        assert process.poll() is None, "the server died"


def data_uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def user(text: str, url: str | None = None) -> dict[str, Any]:
    """A user's message, with an image at an address if there is one."""
    if url is None:
        return {"role": "user", "content": text}
    image = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [{"type": "text", "text": text}, image]}


def chat_request(*messages: dict[str, Any], **settings: Any) -> bytes:
    """A request for an answer, as it goes over the wire."""
    body = json.dumps({"model": MODEL, "messages": messages, **settings}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(body)}\r\n\r\n".encode() + body


def red_circle() -> str:
    return data_uri(IMAGE_FILE.read_bytes())


def ask(client: openai.OpenAI, *messages: dict[str, Any], **settings: Any) -> Any:
    """The reply to messages."""
    return client.chat.completions.create(model=MODEL, messages=list(messages), **settings)


def stream_text(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


class ImageHost(HttpServer):
    """Has one image at most addresses, and misbehaves at others; `requested` are the paths asked for."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(self._answer, tls=tls)

    @property
    def requested(self) -> list[str]:
        return [request.path for request in self.requests]

    def _answer(self, request: Request) -> Response:
        kind, _, rest = request.path.lstrip("/").partition("/")
        if kind == "redirect":
            return Response(status=302, headers={"Location": unquote(rest)})
        if kind == "again":
            return Response(status=302, headers={"Location": request.path})
        if kind == "status":
            return Response(status=int(rest))
        if kind == "compressed":
            return Response(IMAGE_FILE.read_bytes(), headers={"Content-Encoding": "gzip"})
        if kind == "endless":
            chunk = f"{CHUNK:x}\r\n".encode() + bytes(CHUNK) + b"\r\n"
            return Response(repeat(chunk, ENDLESS_CHUNKS), headers={"Transfer-Encoding": "chunked"}, closes=True)
        return Response(IMAGE_FILE.read_bytes())
