"""A listening server process, and its connections, on which the beginning of a request has to come in time."""

import asyncio
import logging
import socket
import sys
from contextlib import suppress

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fusion_hf.common.errors import InputError
from fusion_hf.serving.app import Service, build_app
from fusion_hf.serving.engine import Engine

BACKLOG = 2048
HEAD_SECONDS = 10  # for the head of a request to arrive: uvicorn waits for ever once a byte of it has come
GOODBYE_SECONDS = 5  # for answers on their way when the server is told to end; then they end with what there is
LAST_SECONDS = 10  # for them to reach their clients
# until the event loop, whose turns are short, gets the interpreter from the thread that computes; Python's is 5 ms
SWITCH_SECONDS = 0.001


def listen(host: str, port: int) -> socket.socket:
    """
    Return a listening socket; port 0 is any free one.

    Raises:
        InputError: if there is no such address here, or the port is taken.
    """
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=kind, backlog=BACKLOG)
    except (OSError, UnicodeError, OverflowError) as error:
        raise InputError(f"The server cannot listen on {host} port {port}: {error}.") from error


def address_of(listener: socket.socket) -> str:
    """Where it listens, as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def announce(address: str, name: str) -> None:
    """Say on the standard output, in one line, where the server is."""
    sys.stdout.write(f"{address} serves {name}\n")
    sys.stdout.flush()


class BoundedProtocol(H11Protocol):
    """
    uvicorn's protocol, which closes a connection on which no request has begun for `HEAD_SECONDS`: whether nothing has
    come, or a head that does not end. Between requests uvicorn's own, shorter time holds as long as nothing comes.
    """

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Let the clock run as long as the client is to begin a request."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop()
        elif self._clock is None:
            self._clock = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None


class _Server(uvicorn.Server):
    """Ends answers that take long before it ends itself."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called when the process was told to end."""
        hurry = asyncio.get_running_loop().call_later(GOODBYE_SECONDS, self.engine.finish_soon)
        await super().shutdown(sockets)
        hurry.cancel()


def serve(service: Service, listener: socket.socket) -> None:
    """Say on the standard output, in one line, where the server is, and serve until it is told to end."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    app = build_app(service)
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GOODBYE_SECONDS + LAST_SECONDS,
    )
    announce(address_of(listener), service.name)
    sys.setswitchinterval(SWITCH_SECONDS)
    with suppress(KeyboardInterrupt):  # which is how a person ends it
        _Server(config, app.state.engine).run(sockets=[listener])
