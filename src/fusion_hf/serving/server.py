"""A listening server process."""

import asyncio
import logging
import socket
import sys
from contextlib import suppress

import uvicorn

from fusion_hf.common.errors import InputError
from fusion_hf.serving.app import Service, build_app
from fusion_hf.serving.connections import BoundedProtocol
from fusion_hf.serving.engine import Engine

BACKLOG = 2048
GOODBYE_SECONDS = 5  # for answers on their way when the server is told to end; then they end with what there is
LAST_SECONDS = 10  # for them to reach their clients
# until the event loop, whose turns are short, gets the interpreter from the thread that computes; Python's is 5 ms
SWITCH_SECONDS = 0.001


def listen(host: str, port: int) -> socket.socket:
    """
    A listening socket; port 0 is any free one.

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
