"""A scripted server on the loopback interface that speaks the OpenAI protocol, well or badly, as a test tells it."""

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image
from tests.helpers.http_server import HttpServer, Request, Response
from tests.helpers.image_files import encoded

CHAT, IMAGES = "/v1/chat/completions", "/v1/images/generations"
TOKENS = 7  # of each answer
GARBAGE = '{"turns": [{"question": "Wh'

Payload = dict[str, Any]
# the text of an answer to a prompt, which may be the blocks of a message; or what a bad server has in its place
Writer = Callable[[Payload], str | None]
# what goes wrong with a request: its payload, and how often the same one has come before
Script = Callable[[Payload, int], str | None]


def prompt_of(payload: Payload) -> str:
    """The text of the last message."""
    content = payload["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)


def draw_number(payload: Payload, below: int) -> int:
    """A number that follows from the request alone."""
    return int(hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest(), 16) % below


@dataclass
class Scripted:
    """
    What a server is told, and what it was asked.

    Attributes:
        faults: `slow`, `invalid` (no JSON of the schema), `cut` (unfinished), `drop` (the connection), `half` (drops
            within the response), `huge`, or an HTTP status as text, with `Retry-After` if it ends in `!`.
    """

    writer: Writer
    faults: Script = lambda payload, repeat: None
    key: str | None = None
    models: list[Payload] = field(default_factory=list)
    fingerprint: str | None = None
    seconds: float = 0.0
    slow_seconds: float = 0.5
    requests: list[Payload] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    repeats: Counter[str] = field(default_factory=Counter)
    guard: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def note(self, payload: Payload) -> int:
        """How often the same request has come before."""
        name = json.dumps(payload, sort_keys=True)
        with self.guard:
            self.requests.append(payload)
            self.repeats[name] += 1
            return self.repeats[name] - 1

    def note_answer(self, payload: Payload) -> None:
        with self.guard:
            self.answered[json.dumps(payload, sort_keys=True)] += 1

    def respond(self, request: Request) -> Response | None:
        """Any GET is answered: who waits for the server to be ready asks for its models, without a key."""
        if request.method == "GET":
            return self._refuse(request) if self.models and not self._knows(request) else self._list_models()
        return self._answer(request) if self._knows(request) else self._refuse(request)

    def _knows(self, request: Request) -> bool:
        """Whether the client has the key."""
        return self.key is None or request.headers["Authorization"] == f"Bearer {self.key}"

    def _refuse(self, request: Request) -> Response:
        said = request.headers["Authorization"] or "nothing"
        return Response.json({"error": {"message": f"Incorrect API key provided: {said}"}}, 401)

    def _list_models(self) -> Response:
        return Response.json({"data": self.models})

    def _answer(self, request: Request) -> Response | None:
        payload = request.json()
        time.sleep(self.seconds)
        fault = self.faults(payload, self.note(payload)) or ""
        if fault == "slow":
            time.sleep(self.slow_seconds)
        if fault == "drop":
            return None
        if fault.rstrip("!").isdecimal():
            headers = {"Retry-After": "0"} if fault.endswith("!") else {}
            return Response.json({"error": {"message": "as the script says"}}, int(fault.rstrip("!")), headers)
        if fault == "huge":
            return Response.json({"junk": "x" * 2**23})
        if request.path == IMAGES:
            response = Response.json({"data": [{"b64_json": base64.b64encode(draw_image(payload)).decode()}]})
        elif request.path.startswith(CHAT):  # one provider of lmms-eval adds the path to the address that has it
            response = Response.json(self._chat(payload, fault))
        else:
            return Response.json({"error": {"message": f"there is no {request.path}"}}, 404)
        if fault == "half":
            whole = {"Content-Length": str(len(response.body))}
            return replace(response, body=response.body[: len(response.body) // 2], headers=whole, closes=True)
        self.note_answer(payload)
        return response

    def _chat(self, payload: Payload, fault: str) -> Payload:
        text = GARBAGE if fault == "invalid" else self.writer(payload)
        choice = {"message": {"role": "assistant", "content": text}}
        choice["finish_reason"] = "length" if fault == "cut" else "stop"
        usage = {"prompt_tokens": len(prompt_of(payload).split()), "completion_tokens": TOKENS}
        answer = {"model": payload.get("model"), "choices": [choice], "usage": usage}
        return answer | {"system_fingerprint": self.fingerprint}


def draw_image(payload: Payload) -> bytes:
    """A PNG whose two colours follow from the request."""
    width, height = (int(side) for side in payload["size"].split("x"))
    number = draw_number(payload, 2**24)
    image = Image.new("RGB", (width, height), (number % 256, number // 256 % 256, number // 65536))
    image.putpixel((0, 0), (255 - number % 256, 0, 0))
    return encoded(image)


@contextmanager
def serve(script: Scripted, port: int = 0) -> Iterator[Scripted]:
    """Serve what the script says, at its `url`; without a port, at a free one."""
    with HttpServer(script.respond, port) as server:
        script.url = server.url
        yield script
