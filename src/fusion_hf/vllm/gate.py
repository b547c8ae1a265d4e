"""What stands before vLLM's server: the limits, the key and the fields of FUSION's own server.

vLLM alone opens any address that a client names, takes bodies of any size and passes over `query_len` in silence.
"""

import asyncio
import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusion_hf.endpoints import data_uri
from fusion_hf.image_limits_fusion import ImageError, check_decoder
from fusion_hf.image_opening_fusion import identify_image
from fusion_hf.serving.app import HEALTH, KeyCheck, Places, check_content_type, error_reply, read_body
from fusion_hf.serving.errors import (
    BAD_REQUEST,
    NOT_FOUND,
    ApiError,
    wrong_value,
)
from fusion_hf.serving.fetch import HostPolicy, fetch_picture
from fusion_hf.serving.images import PARAM, decode_data_uri, is_data_uri, not_usable
from fusion_hf.serving.limits import Limits
from fusion_hf.serving.requests import check_count, load_json
from fusion_hf.serving.server import announce

VARIABLE = "FUSION_HF_GATE"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MODELS = "/v1/models"
READABLE = (HEALTH, MODELS, "/metrics", "/version")
PROCESSOR_ARGUMENTS = "mm_processor_kwargs"
BUDGET = ("query_len", "image_token_grid")
# they would change how pictures are read, or name files and templates
REFUSED = ("media_io_kwargs", "chat_template", "mm_uuids")
PARTS = ("text", "image_url")


@dataclass(frozen=True)
class GateSettings:
    """
    What the gate lets pass; travels to vLLM's server in an environment variable.

    address, name: told on the standard output as soon as the server answers; no address: nothing is.
    api_key_env: the environment variable with the key; None: everybody may ask.
    public_hosts, private_hosts: see [`HostPolicy.parse`].
    query_len, image_token_grid: of requests that say nothing about them.
    """

    address: str | None = None
    name: str = ""
    api_key_env: str | None = None
    public_hosts: list[str] = field(default_factory=list)
    private_hosts: list[str] = field(default_factory=list)
    query_len: int | None = None
    image_token_grid: int | None = None
    limits: Limits = field(default_factory=Limits)

    def to_environment(self) -> None:
        """Leave the settings to the server that this process becomes."""
        os.environ[VARIABLE] = json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> "GateSettings":
        """The settings that were left; the defaults where there are none."""
        values = json.loads(os.environ.get(VARIABLE, "{}"))
        return cls(**values | {"limits": Limits(**values.get("limits", {}))})


class Gate:
    """An ASGI application around vLLM's, which makes it by its option `--middleware`."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.settings = GateSettings.from_environment()
        self.hosts = HostPolicy.parse(self.settings.public_hosts, self.settings.private_hosts)
        variable = self.settings.api_key_env
        self.checked = KeyCheck(self._pass, None if variable is None else os.environ[variable])
        self.places = Places(self.settings.limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, self._announcing(send))
        elif scope["type"] == "http":
            try:
                await self.checked(scope, receive, send)
            except ApiError as error:
                await error_reply(error)(scope, receive, send)
            except ClientDisconnect:  # before its request was whole
                return

    def _announcing(self, send: Send) -> Send:
        async def send_and_tell(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete" and self.settings.address is not None:
                announce(self.settings.address, self.settings.name)

        return send_and_tell

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Raises:
            ApiError: if the request may not pass.
        """
        method, path = scope["method"], scope["path"]
        if method == "POST" and path in (CHAT, COMPLETIONS):
            with self.places.take():
                body = await self._checked_body(Request(scope, receive), is_chat=path == CHAT)
                headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
                headers.append((b"content-length", str(len(body)).encode()))
                await self.app({**scope, "headers": headers}, _replay(body, receive), send)
        elif method == "GET" and (path in READABLE or path.startswith(f"{MODELS}/")):
            await self.app(scope, receive, send)
        else:
            allowed = ", ".join((f"POST {CHAT}", f"POST {COMPLETIONS}", *(f"GET {name}" for name in READABLE)))
            raise ApiError(NOT_FOUND, f"There is no {method[:10]} {path[:80]!r} here; allowed: {allowed}.")

    async def _checked_body(self, request: Request, is_chat: bool) -> bytes:
        check_content_type(request)
        content = load_json(await read_body(request, self.settings.limits.body_bytes))
        for name in REFUSED:
            if content.get(name) is not None:
                raise wrong_value(name, content[name], "nothing: this server does not take it", "unknown_parameter")
        self._move_budget(content)
        if is_chat:
            images = find_images(content.get("messages"))
            check_count(len(images))
            for image in images:
                image["url"] = await self._checked_picture(image.get("url"))
        return json.dumps(content).encode()

    def _move_budget(self, content: dict[str, Any]) -> None:
        """`query_len` and `image_token_grid` to where vLLM has them."""
        arguments = content.get(PROCESSOR_ARGUMENTS) or {}
        if not isinstance(arguments, dict):
            raise wrong_value(PROCESSOR_ARGUMENTS, arguments, f"an object with {', '.join(BUDGET)}")
        chosen = {name: getattr(self.settings, name) for name in BUDGET}
        for name in BUDGET:
            given = content.pop(name, None)
            chosen[name] = arguments.get(name, chosen[name] if given is None else given)
        content[PROCESSOR_ARGUMENTS] = arguments | {name: x for name, x in chosen.items() if x is not None}

    async def _checked_picture(self, url: Any) -> str:
        """A data URI of a picture within the limits."""
        limits = self.settings.limits
        if not isinstance(url, str):
            raise wrong_value(PARAM, url, "a data URI, or an http or https address")
        is_inline = is_data_uri(url)
        content = decode_data_uri(url, limits) if is_inline else await fetch_picture(url, self.hosts, limits)
        kind = await asyncio.to_thread(_check_size, content, limits)
        return url if is_inline else data_uri(content, kind)


def find_images(messages: Any) -> list[dict[str, Any]]:
    """The `image_url` objects of messages.

    Raises:
        ApiError: if there is a part of another kind than texts and pictures. What else is wrong, vLLM says.
    """
    images = []
    for message in messages if isinstance(messages, list) else []:
        parts = message.get("content") if isinstance(message, dict) else None
        for part in parts if isinstance(parts, list) else []:
            kind = part.get("type") if isinstance(part, dict) else part
            if not isinstance(part, dict) or kind not in PARTS:
                raise wrong_value("messages.content.type", kind, ", ".join(PARTS))
            if kind == "image_url":
                image = part.get("image_url")
                if not isinstance(image, dict):
                    raise wrong_value("messages.content.image_url", image, 'an object: {"url": "..."}')
                images.append(image)
    return images


def _check_size(content: bytes, limits: Limits) -> str:
    """The picture's MIME type; nothing of its pixels is decoded."""
    try:
        picture = identify_image(content)
        check_decoder(picture, len(content))
    except ImageError as error:
        raise not_usable(error) from error
    size = picture.width * picture.height
    if size > limits.image_pixels:
        raise ApiError(BAD_REQUEST, f"The picture has {size} pixels; allowed: {limits.image_pixels}.", PARAM)
    return Image.MIME[str(picture.format)]


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then what the client does."""
    remaining: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return remaining.pop() if remaining else await receive()

    return replay
