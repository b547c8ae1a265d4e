"""Requests that come slowly, or never: they keep nobody out, and do not stay."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import uvicorn
from tests.helpers.serving import MODEL, QUESTION, SECONDS, Server, ask, receive, red_circle, run_server, user

from fusion_hf.serving.server import HEAD_SECONDS, BoundedProtocol

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY_BYTES = 100_000
SHORT = 0.4  # seconds
MANY = 6
PAUSE = 0.05
STATUS = b"HTTP/1.1 "


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    """One answer at a time, one request may wait; two and a half bodies may be on their way."""
    sizes = ("--max-body-bytes", BODY_BYTES, "--max-upload-bytes", BODY_BYTES * 5 // 2)
    with run_server("--concurrency", 1, "--queue-length", 1, *sizes) as running:
        yield running


@contextmanager
def upload(server: Server, content: bytes, declared: int = BODY_BYTES) -> Iterator[socket.socket]:
    """A request of whose body so much has been sent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % declared + content)
        yield connection


def test_slow_uploads_take_no_places(small: Server):
    with ExitStack() as stack:
        for _ in range(MANY):
            stack.enter_context(upload(small, b"{"))
        time.sleep(PAUSE)
        assert small.health() == {"status": "ok", "running": 0, "waiting": 0}
        assert ask(small.client(), user(QUESTION)).choices[0].message.content


def test_a_slow_upload_is_answered_when_it_is_whole(small: Server):
    body = json.dumps({"model": MODEL, "messages": [user(QUESTION, red_circle())]}).encode()
    with upload(small, b"", len(body)) as connection:
        for begin in range(0, len(body), 500):
            connection.sendall(body[begin : begin + 500])
            time.sleep(PAUSE / 10)
        assert b'"red"' in receive(connection)


def test_uploads_are_bounded_together(small: Server):
    """Bytes that came are counted, not those that were declared; who goes away gives them back."""
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(upload(small, b" " * (BODY_BYTES - 1)))
        time.sleep(4 * PAUSE)
        with upload(small, b" " * (BODY_BYTES - 1)) as connection:
            answer = receive(connection)
        assert answer.startswith(STATUS + b"503")
        assert b"retry-after: 1" in answer.lower()
        assert b"bodies of arriving requests may have %d bytes" % (BODY_BYTES * 5 // 2) in answer
        assert ask(small.client(), user(QUESTION)).choices[0].message.content  # a small one has room
    time.sleep(4 * PAUSE)
    with upload(small, b" " * BODY_BYTES) as connection:
        assert receive(connection).startswith(STATUS + b"400")  # whole, and no JSON


async def _hello(scope, receive, send) -> None:
    """Answers as soon as the body is whole, and waits where the path says so."""
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(3 * SHORT if scope["path"] == "/slow" else 0)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


class Client:
    """A connection to a small server in this process whose heads have to come within SHORT seconds."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader = reader
        self.writer = writer

    async def send(self, content: bytes) -> None:
        self.writer.write(content)
        await self.writer.drain()

    async def answer(self) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(b"hello"), SECONDS)

    async def seconds_until_closed(self) -> float:
        begin = time.monotonic()
        assert await asyncio.wait_for(self.reader.read(), SECONDS) == b""
        return time.monotonic() - begin

    async def trickle(self) -> float:
        """Seconds until the connection is closed while bytes of a head come all the time."""
        begin, closed = time.monotonic(), asyncio.ensure_future(self.reader.read())
        while not closed.done():
            assert time.monotonic() - begin < SECONDS
            self.writer.write(b"x")
            await asyncio.wait({closed}, timeout=PAUSE)
        return time.monotonic() - begin


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch):
    """Runs a coroutine function with a client."""
    monkeypatch.setattr("fusion_hf.serving.server.HEAD_SECONDS", SHORT)

    async def run(work) -> None:
        config = uvicorn.Config(_hello, http=BoundedProtocol, ws="none", lifespan="off", log_level="error")
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                while not server.started:
                    await asyncio.sleep(PAUSE)
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                await work(Client(reader, writer))
                writer.close()
            finally:
                server.should_exit = True
                await serving

    return lambda work: asyncio.run(run(work))


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


def test_a_connection_on_which_nothing_comes(connected):
    async def work(client: Client) -> None:
        assert SHORT / 2 < await client.seconds_until_closed() < 10 * SHORT

    connected(work)


@pytest.mark.parametrize("before", [b"", GET, POST + b"abcd"], ids=["first", "second", "behind_a_body"])
def test_a_head_that_never_ends(connected, before: bytes):
    async def work(client: Client) -> None:
        if before:
            await client.send(before)
            assert (await client.answer()).startswith(STATUS + b"200")
        await client.send(GET[:20])
        assert SHORT / 2 < await client.trickle() < 10 * SHORT

    connected(work)


def test_a_head_behind_a_request_that_is_being_answered(connected):
    """Its time begins with the answer's end."""

    async def work(client: Client) -> None:
        await client.send(GET.replace(b"/ ", b"/slow ", 1) + GET[:20])
        assert (await client.answer()).startswith(STATUS + b"200")
        assert SHORT / 2 < await client.trickle() < 10 * SHORT

    connected(work)


def test_what_is_left_alone(connected):
    """A slow body, a slow answer, and requests one after the other or at once."""

    async def work(client: Client) -> None:
        await client.send(POST)
        for byte in b"abcd":
            await asyncio.sleep(SHORT / 2)
            await client.send(bytes([byte]))
        assert (await client.answer()).startswith(STATUS + b"200")
        await client.send(GET.replace(b"/ ", b"/slow ", 1))
        assert (await client.answer()).startswith(STATUS + b"200")
        for _ in range(3):
            await asyncio.sleep(SHORT / 2)
            await client.send(GET + GET)
            for _ in range(2):
                assert (await client.answer()).startswith(STATUS + b"200")

    connected(work)


@pytest.mark.slow
def test_the_server_itself_closes_such_connections(small: Server):
    with socket.create_connection(("127.0.0.1", small.port), timeout=SECONDS) as connection:
        connection.sendall(HEAD)
        begin = time.monotonic()
        assert connection.recv(1) == b""
        assert HEAD_SECONDS / 2 < time.monotonic() - begin < 2 * HEAD_SECONDS
