"""The ASGI application of the server: authentication, limits, requests and replies.

Why not `transformers serve`? It opens any address or file and loads any model that a client names. It has no limits,
no bounded queue and no API key. It does not accept `query_len`, silently ignores `n` and `stream_options`, draws all
answers with one random state, and answers requests one after another. None of this can be changed from outside.
"""

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusion_hf.common.errors import short_name
from fusion_hf.common.image_hosts import HostPolicy
from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.inference.model_info import ModelInfo
from fusion_hf.model.configuration_fusion import TokenBudget
from fusion_hf.serving.api_errors import (
    CHAT,
    INTERNAL,
    NOT_FOUND,
    TIMEOUT,
    TOO_LARGE,
    TOO_MANY,
    UNAUTHORIZED,
    UNSUPPORTED_TYPE,
    ApiError,
    no_such_path,
    overloaded,
)
from fusion_hf.serving.chat_requests import ChatRequest, load_json, parse_chat_request
from fusion_hf.serving.client_images import decode_data_uri, is_data_uri
from fusion_hf.serving.engine import Engine, Finished, Piece
from fusion_hf.serving.image_fetching import fetch_image
from fusion_hf.serving.limits import Limits
from fusion_hf.serving.replies import END, Completion, model_object, sse

HEALTH, MODELS = "/health", "/v1/models"
BODY_SECONDS = 30.0  # timeout for the body of a request
SEND_SECONDS = 30.0  # timeout for a client to receive a piece of its answer
CANCEL_SECONDS = 0.1  # interval between cancellations of work for a client that has disconnected
JSON = "application/json"
Result = TypeVar("Result")
SSE_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


@dataclass(frozen=True)
class Service:
    """
    The configuration of the server.

    Attributes:
        chat_model: the model.
        name: the name of the model for clients.
        limits: the limits on requests.
        hosts: the hosts that images may be downloaded from.
        api_key: the API key. None accepts all requests.
        budget: the numbers of image tokens and latent tokens of requests that do not set them.
    """

    chat_model: ChatModel
    name: str
    limits: Limits
    hosts: HostPolicy
    api_key: str | None
    budget: TokenBudget


def build_app(service: Service) -> Starlette:
    """
    Build the ASGI application. It runs the engine in its state and answers in its event loop.

    Args:
        service: the configuration of the server.
    """
    engine = Engine(service.chat_model, service.limits, service.budget)
    info = ModelInfo.of(service.chat_model, service.budget)
    chat = ChatEndpoint(service, engine, info.fingerprint)
    model = model_object(service.name, int(time.time()), info)

    async def health(request: Request) -> JSONResponse:
        waiting = chat.intake.taken - engine.running
        return JSONResponse({"status": "ok", "running": engine.running, "waiting": max(waiting, 0)})

    async def list_models(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model]})

    async def retrieve_model(request: Request) -> JSONResponse:
        name = request.path_params["name"]
        if name != service.name:
            message = f"`model` must be {service.name!r}, got {short_name(name)!r}."
            raise ApiError(NOT_FOUND, message, "model", "model_not_found")
        return JSONResponse(model)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.close()

    app = Starlette(
        routes=[
            Route(HEALTH, health),
            Route(MODELS, list_models),
            Route(f"{MODELS}/{{name:path}}", retrieve_model),
            Route(CHAT, chat, methods=["POST"]),
        ],
        middleware=[Middleware(KeyCheck, api_key=service.api_key)],
        exception_handlers=dict.fromkeys((ApiError, HTTPException, Exception), _reply_to_error),
        lifespan=lifespan,
    )
    app.state.engine = engine
    return app


def error_reply(error: ApiError) -> JSONResponse:
    """
    Convert an error to an HTTP response.

    Args:
        error: the error.
    """
    return JSONResponse(error.content, error.status, error.headers)


def _reply_to_error(request: Request, error: Exception) -> JSONResponse:
    method, path = request.method, request.url.path
    if isinstance(error, HTTPException) and error.status_code == NOT_FOUND:
        error = no_such_path(method, path, f"POST {CHAT}, GET {MODELS}, GET {HEALTH}")
    elif isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{method} {short_name(path)}: {error.detail}", headers=error.headers)
    elif not isinstance(error, ApiError):
        error = ApiError(INTERNAL, "The request failed. See the log of the server for the reason.")
    return error_reply(error)


class KeyCheck:
    """
    ASGI middleware that rejects requests without the API key. The health check needs no key.

    Args:
        app: the application to protect.
        api_key: the API key. None accepts all requests.
    """

    def __init__(self, app: ASGIApp, api_key: str | None):
        self.app = app
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != HEALTH and not self._is_known(scope):
            error = ApiError(
                UNAUTHORIZED,
                "The API key is missing or wrong. Send it in the header `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error_reply(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self.expected is None or hmac.compare_digest(given, self.expected)


class Intake:
    """
    Limit what clients send: the number of accepted and waiting requests, and the bytes of bodies that are still
    arriving.

    Bytes are counted as they arrive, not connections, so that slow clients keep nobody out.

    Args:
        limits: the limits on requests.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.taken = 0  # number of accepted requests
        self.most_held = max(limits.upload_bytes, limits.body_bytes)
        self.held = 0  # bytes of arriving bodies

    @contextmanager
    def take_slot(self) -> Iterator[None]:
        """
        Reserve a place for a request while the context is active.

        Raises:
            ApiError: if all places are taken.
        """
        self._check_slots()
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    def _check_slots(self) -> None:
        limits = self.limits
        if self.taken >= limits.parallel + limits.queue_length:
            raise overloaded(
                f"The server is busy: {limits.parallel} requests are being answered and {limits.queue_length} are "
                "waiting. Try again soon.",
                TOO_MANY,
            )

    async def read(self, request: Request) -> dict[str, Any]:
        """
        Read the JSON body of a request.

        Args:
            request: the request.

        Returns:
            The JSON object.

        Raises:
            ApiError: if the content type is not JSON (otherwise any web page could send requests from its visitor's
                browser), the body is not valid JSON, all places are taken, the body is larger than `body_bytes` or
                arrives too slowly, or too many bodies are arriving.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON:
            raise ApiError(UNSUPPORTED_TYPE, f"`Content-Type` must be {JSON}, got {kind[:80]!r}.")
        self._check_slots()  # a request without a place need not send its body
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.limits.body_bytes:
            raise self._too_large()
        content = bytearray()
        try:
            await asyncio.wait_for(self._receive(request, content), BODY_SECONDS)
            return load_json(bytes(content))
        except asyncio.TimeoutError as late:
            raise ApiError(
                TIMEOUT, f"The body of the request did not arrive within {BODY_SECONDS:g} seconds."
            ) from late
        finally:
            self.held -= len(content)

    async def _receive(self, request: Request, content: bytearray) -> None:
        async for chunk in request.stream():
            if len(content) + len(chunk) > self.limits.body_bytes:
                raise self._too_large()
            if self.held + len(chunk) > self.most_held:
                raise overloaded(
                    f"The bodies of arriving requests may have {self.most_held} bytes in total, got {self.held}. "
                    "Try again soon."
                )
            self.held += len(chunk)
            content.extend(chunk)

    def _too_large(self) -> ApiError:
        return ApiError(TOO_LARGE, f"The body of a request must have at most {self.limits.body_bytes} bytes.")


class ChatEndpoint:
    """
    The ASGI application for `POST /v1/chat/completions`.

    Args:
        service: the configuration of the server.
        engine: the engine.
        fingerprint: the fingerprint of the model for replies.
    """

    def __init__(self, service: Service, engine: Engine, fingerprint: str):
        self.service = service
        self.engine = engine
        self.fingerprint = fingerprint
        self.intake = Intake(service.limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        deadline = time.monotonic() + self.service.limits.seconds
        with suppress(ClientDisconnect, asyncio.TimeoutError):  # the client has disconnected or does not read
            asked = await self._read(request)
            with self.intake.take_slot():
                await unless_gone(receive, self._answer(asked, deadline, scope, receive, send))

    async def _read(self, request: Request) -> ChatRequest:
        """Return the request with the bytes or the address of its image. The body, which may be large, is dropped."""
        limits = self.service.limits
        asked = parse_chat_request(await self.intake.read(request), self.service.name, limits)
        if isinstance(asked.image, str) and is_data_uri(asked.image):
            return replace(asked, image=decode_data_uri(asked.image, limits))
        return asked

    async def _answer(self, asked: ChatRequest, deadline: float, scope: Scope, receive: Receive, send: Send) -> None:
        image = asked.image
        if isinstance(image, str):
            image = await fetch_image(image, self.service.hosts, self.service.limits)
        completion = Completion(self.service.name, self.fingerprint)
        async with aclosing(self.engine.answer(asked, image, deadline)) as events:
            if asked.stream:
                await self._stream(asked, completion, events, send)
                return
            texts: list[str] = []
            async for event in events:
                if isinstance(event, Piece):
                    texts.append(event.text)
                else:
                    reply = JSONResponse(completion.whole("".join(texts), event))
        await reply(scope, receive, send)

    async def _stream(
        self, asked: ChatRequest, completion: Completion, events: AsyncGenerator[Piece | Finished, None], send: Send
    ) -> None:
        event = await anext(events)  # errors of the request appear here, while they can still set the HTTP status
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        begin = {"role": "assistant", "content": ""}
        await _send_piece(send, completion.chunk(begin, asked.include_usage))
        try:
            while isinstance(event, Piece):
                await _send_piece(send, completion.chunk({"content": event.text}, asked.include_usage))
                event = await anext(events)
        except ApiError as error:
            await _send_piece(send, sse(error.content), is_last=True)
            return
        last = completion.chunk({}, asked.include_usage, event.reason)
        if asked.include_usage:
            last += completion.usage_chunk(event)
        await _send_piece(send, last + END, is_last=True)


async def _send_piece(send: Send, body: bytes, is_last: bool = False) -> None:
    """Send a piece of a body. Raise `asyncio.TimeoutError` if the client does not receive it."""
    message = {"type": "http.response.body", "body": body, "more_body": not is_last}
    await asyncio.wait_for(send(message), SEND_SECONDS)


def replay(body: bytes, receive: Receive) -> Receive:
    """
    Return a `receive` that gives a body that was read already, and then what the client sends.

    Args:
        body: the body.
        receive: the `receive` of the request.
    """
    remaining: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return remaining.pop() if remaining else await receive()

    return receive_again


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result | None:
    """
    Return the result of some work, or None if the client disconnects first.

    Args:
        receive: the `receive` of the request.
        work: the work.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_wait_until_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        watching.cancel()
        while not working.done():  # `wait_for` may swallow a cancellation before Python 3.12
            working.cancel()
            await asyncio.wait({working}, timeout=CANCEL_SECONDS)
        await asyncio.gather(working, watching, return_exceptions=True)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
