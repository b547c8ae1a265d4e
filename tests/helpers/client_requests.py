"""Requests of real clients.

`tests/fixtures/client_requests` holds what a small server recorded from the packages named in it; the image is a mark
there, and long texts are shortened. Those of `by_hand.json` are written after the code of tools.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tests.helpers.serving import MODEL, ROOT, SECONDS, Server, red_circle

FOLDER = ROOT / "tests" / "fixtures" / "client_requests"
IMAGE_MARK = "data:image/png;base64,RED_CIRCLE"


@dataclass(frozen=True)
class ClientRequest:
    """A client's request; `refused` is the field, or "path", that a server without tools refuses."""

    client: str
    call: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    refused: str | None

    def __str__(self) -> str:
        return f"{self.client}: {self.call}"

    @property
    def has_image(self) -> bool:
        return IMAGE_MARK in json.dumps(self.body)

    @property
    def content(self) -> str:
        """The body as JSON, with the image."""
        return json.dumps(self.body).replace(IMAGE_MARK, red_circle())


def read_recordings() -> Iterator[ClientRequest]:
    """All of them, client by client."""
    for file in sorted(FOLDER.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        for request in content["requests"]:
            yield ClientRequest(
                file.stem,
                request["call"],
                request["path"],
                content["headers"],
                request["body"],
                request.get("refused"),
            )


def send(server: Server, recording: ClientRequest) -> tuple[int, str, str]:
    """Status, content type and text of the reply."""
    # urllib does not unpack what a server may compress
    headers = {name: value for name, value in recording.headers.items() if name != "accept-encoding"}
    request = urllib.request.Request(server.url + recording.path, recording.content.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:
            return reply.status, reply.headers["content-type"], reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["content-type"], error.read().decode()


def _read_whole(text: str) -> str:
    """The answer, read as strictly as OpenAI's own types."""
    completion = ChatCompletion.model_validate_json(text)
    (choice,) = completion.choices
    assert (completion.object, completion.model, choice.message.role) == ("chat.completion", MODEL, "assistant")
    assert choice.finish_reason in ("stop", "length")
    assert completion.usage is not None and completion.usage.total_tokens > completion.usage.completion_tokens > 0
    assert choice.message.content is not None
    return choice.message.content


def _read_stream(text: str, wants_usage: bool) -> str:
    events = text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(event.removeprefix("data: ")) for event in events[:-1]]
    assert {(chunk.object, chunk.model) for chunk in chunks} == {("chat.completion.chunk", MODEL)}
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert choices[-1].finish_reason in ("stop", "length")
    assert (chunks[-1].usage is not None) == wants_usage
    return "".join(choice.delta.content or "" for choice in choices)


def answer_to(server: Server, recording: ClientRequest) -> str:
    """The answer, whole or streamed, in the shape that the client expects."""
    status, kind, text = send(server, recording)
    assert status == 200, text
    if recording.body.get("stream"):
        assert kind.startswith("text/event-stream")
        return _read_stream(text, bool((recording.body.get("stream_options") or {}).get("include_usage")))
    assert kind == "application/json"
    return _read_whole(text)
