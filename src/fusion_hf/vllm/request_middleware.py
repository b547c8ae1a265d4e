"""Middleware for vLLM's server with the limits, the API key and the fields of FUSION's own server.

vLLM alone opens any address that a client names, accepts bodies of any size, and silently ignores `query_len`.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusion_hf.common.endpoints import data_uri, read_key
from fusion_hf.common.image_hosts import HostPolicy
from fusion_hf.serving.api_errors import CHAT, ApiError, no_such_path, wrong_value
from fusion_hf.serving.app import HEALTH, MODELS, Intake, KeyCheck, error_reply, replay, unless_gone
from fusion_hf.serving.chat_requests import parse_max_tokens
from fusion_hf.serving.client_images import decode_data_uri, is_data_uri
from fusion_hf.serving.fields import REQUEST, WITHOUT_TOOLS, Fields
from fusion_hf.serving.image_fetching import fetch_image
from fusion_hf.serving.image_workers import ImageWorkers
from fusion_hf.serving.limits import Limits
from fusion_hf.serving.messages import parse_messages
from fusion_hf.serving.server import announce

VARIABLE = "FUSION_HF_GATE"
COMPLETIONS = "/v1/completions"
READABLE = (HEALTH, MODELS, "/metrics", "/version")
PROCESSOR_ARGUMENTS = "mm_processor_kwargs"
BUDGET = ("query_len", "image_token_grid")
# these fields would change how images are read, or name files and templates
REFUSED = ("media_io_kwargs", "chat_template", "mm_uuids")
# FUSION's renderer shows no tools to the model, and vLLM rejects a choice from no tools
TOOLS = Fields(known=(), neutral=WITHOUT_TOOLS)
LENGTHS = ("max_completion_tokens", "max_tokens")


@dataclass(frozen=True)
class MiddlewareSettings:
    """
    The settings of the middleware. They are passed to vLLM's server in an environment variable.

    Attributes:
        address: the URL to write to the standard output when the server answers. None writes nothing.
        name: the name of the model to write with it.
        api_key_env: the environment variable with the API key. None accepts all requests.
        public_hosts: hosts that images may be downloaded from, see [`HostPolicy.parse`].
        private_hosts: hosts of a private network that images may be downloaded from, see [`HostPolicy.parse`].
        query_len: the number of latent tokens of requests that do not set it.
        image_token_grid: the side of the grid of image tokens of requests that do not set it.
        limits: the limits on requests.
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
        """Store the settings in the environment of this process, which becomes the server."""
        os.environ[VARIABLE] = json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> "MiddlewareSettings":
        """Read the settings from the environment. Return the defaults if there are none."""
        values = json.loads(os.environ.get(VARIABLE, "{}"))
        return cls(**values | {"limits": Limits(**values.get("limits", {}))})


class RequestMiddleware:
    """
    An ASGI application around vLLM's, which vLLM creates through its option `--middleware`.

    Args:
        app: the application of vLLM.
    """

    def __init__(self, app: ASGIApp):
        self.app = app
        self.settings = MiddlewareSettings.from_environment()
        self.hosts = HostPolicy.parse(self.settings.public_hosts, self.settings.private_hosts)
        variable = self.settings.api_key_env
        self.checked = KeyCheck(self._pass, None if variable is None else read_key(variable))
        self.intake = Intake(self.settings.limits)
        self.images = ImageWorkers(None, self.settings.limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.images.start()
            try:
                await self.app(scope, receive, self._announcing(send))
            finally:
                await self.images.close()
        elif scope["type"] == "http":
            try:
                await self.checked(scope, receive, send)
            except ApiError as error:
                await error_reply(error)(scope, receive, send)
            except ClientDisconnect:  # the client disconnected before the request was complete
                return

    def _announcing(self, send: Send) -> Send:
        async def send_and_tell(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete" and self.settings.address is not None:
                announce(self.settings.address, self.settings.name)

        return send_and_tell

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or raise an `ApiError`."""
        method, path = scope["method"], scope["path"]
        if method == "POST" and path in (CHAT, COMPLETIONS):
            content = await self.intake.read(Request(scope, receive))
            with self.intake.take_slot():
                body = await unless_gone(receive, self._checked_body(content, is_chat=path == CHAT))
                if body is None:
                    return
                headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
                headers.append((b"content-length", str(len(body)).encode()))
                await self.app({**scope, "headers": headers}, replay(body, receive), send)
        elif method == "GET" and (path in READABLE or path.startswith(f"{MODELS}/")):
            await self.app(scope, receive, send)
        else:
            allowed = ", ".join((f"POST {CHAT}", f"POST {COMPLETIONS}", *(f"GET {name}" for name in READABLE)))
            raise no_such_path(method, path, allowed)

    async def _checked_body(self, given: dict[str, Any], is_chat: bool) -> bytes:
        # vLLM would check the types of ignored fields
        content = {name: x for name, x in given.items() if x is not None and name not in REQUEST.ignored}
        for name in REFUSED:
            if content.pop(name, None):
                raise wrong_value(
                    name, given[name], "left out, since this server does not accept it", "unknown_parameter"
                )
        self._move_budget(content)
        if is_chat:
            TOOLS.select({name: content.pop(name) for name in WITHOUT_TOOLS if name in content})
            self._limit_answer(content)
            content["messages"] = await self._checked_messages(content)
        return json.dumps(content).encode()

    async def _checked_messages(self, content: dict[str, Any]) -> list[dict[str, Any]]:
        """Parse messages as this package's server does, with the image as a data URI."""
        chat = parse_messages(content.get("messages"), content.get("continue_final_message") is True)
        if chat.image is None:
            return chat.messages
        image = {"type": "image_url", "image_url": {"url": await self._checked_image(chat.image)}}
        return [
            {**message, "content": [image if block["type"] == "image" else block for block in message["content"]]}
            for message in chat.messages
        ]

    def _limit_answer(self, content: dict[str, Any]) -> None:
        """
        Remove a length above the server's limit from a chat, so that vLLM's default applies, which is that
        limit.
        """
        most = self.settings.limits.answer_tokens
        length = parse_max_tokens(content, most)
        for name in LENGTHS:
            content.pop(name, None)
        if length < most:
            content["max_tokens"] = length

    def _move_budget(self, content: dict[str, Any]) -> None:
        """Move `query_len` and `image_token_grid` to where vLLM expects them."""
        arguments = content.get(PROCESSOR_ARGUMENTS) or {}
        if not isinstance(arguments, dict):
            raise wrong_value(PROCESSOR_ARGUMENTS, arguments, f"an object with the keys {', '.join(BUDGET)}")
        chosen = {name: getattr(self.settings, name) for name in BUDGET}
        for name in BUDGET:
            given = content.pop(name, None)
            chosen[name] = arguments.get(name, chosen[name] if given is None else given)
        content[PROCESSOR_ARGUMENTS] = arguments | {name: x for name, x in chosen.items() if x is not None}

    async def _checked_image(self, url: str) -> str:
        """Return a data URI of an image that vLLM may decode."""
        limits = self.settings.limits
        is_inline = is_data_uri(url)
        content = decode_data_uri(url, limits) if is_inline else await fetch_image(url, self.hosts, limits)
        kind, vetted = await self.images.vet(content)
        return url if is_inline and vetted is content else data_uri(vetted, kind)
