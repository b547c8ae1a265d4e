"""The server process and its connections, on which requests must start in time."""

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
HEAD_SECONDS = 10  # timeout for the headers of a request, since uvicorn waits forever once a byte has arrived
GOODBYE_SECONDS = 5  # time for answers in progress when the server is stopped; then they end with the text so far
LAST_SECONDS = 10  # time to send them to their clients
# interval after which the model thread yields the interpreter to the event loop; Python's default is 5 ms
SWITCH_SECONDS = 0.001


def listen(host: str, port: int) -> socket.socket:
    """
    Open a listening socket.

    Args:
        host: the address.
        port: the port. 0 selects any free port.

    Raises:
        InputError: if the address does not exist on this machine, or the port is in use.
    """
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=kind, backlog=BACKLOG)
    except (OSError, UnicodeError, OverflowError) as error:
        raise InputError(f"The server cannot listen on {host} port {port}: {error}.") from error


def address_of(listener: socket.socket) -> str:
    """
    Return the URL of a listening socket.

    Args:
        listener: the socket.
    """
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def announce(address: str, name: str) -> None:
    """
    Write one line with the address of the server to the standard output.

    Args:
        address: the URL of the server.
        name: the name of the model.
    """
    sys.stdout.write(f"{address} serves {name}\n")
    sys.stdout.flush()


class BoundedProtocol(H11Protocol):
    """
    uvicorn's protocol, which also closes connections on which no request has started for `HEAD_SECONDS`.

    This covers silent connections and headers that never end. Between requests, uvicorn's own, shorter timeout applies
    as long as nothing arrives.
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
        """Run the timer while the client is expected to start a request."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop()
        elif self._clock is None:
            self._clock = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None


class _Server(uvicorn.Server):
    """A server that ends long answers before it stops."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the answers and stop. uvicorn calls this when the process is told to stop."""
        hurry = asyncio.get_running_loop().call_later(GOODBYE_SECONDS, self.engine.finish_soon)
        await super().shutdown(sockets)
        hurry.cancel()


def serve(service: Service, listener: socket.socket) -> None:
    """
    Serve until the process is told to stop, and write one line with the address to the standard output.

    Args:
        service: the configuration of the server.
        listener: the listening socket.
    """
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
    with suppress(KeyboardInterrupt):  # Ctrl-C stops the server
        _Server(config, app.state.engine).run(sockets=[listener])
