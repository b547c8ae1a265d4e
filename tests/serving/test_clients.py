"""What real clients send by default is answered in the shape that they read, and what cannot be done is named."""

import json
import urllib.error
import urllib.request

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tests.docs.markdown import ROOT
from tests.helpers.client_requests import FOLDER, IMAGE_MARK, Recording, read_recordings
from tests.helpers.serving import MODEL, SECONDS, Server

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
LIKELY = 0.01  # drawn with less, an answer is the most likely one


RECORDINGS = list(read_recordings())
ACCEPTED = [recording for recording in RECORDINGS if recording.refused is None]
REFUSED = [recording for recording in RECORDINGS if recording.refused is not None]


def send(server: Server, recording: Recording) -> tuple[int, str, str]:
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


def read_whole(text: str) -> str:
    """The answer, read as strictly as OpenAI's own types."""
    completion = ChatCompletion.model_validate_json(text)
    (choice,) = completion.choices
    assert (completion.object, completion.model, choice.message.role) == ("chat.completion", MODEL, "assistant")
    assert choice.finish_reason in ("stop", "length")
    assert completion.usage is not None and completion.usage.total_tokens > completion.usage.completion_tokens > 0
    assert choice.message.content is not None
    return choice.message.content


def read_stream(text: str, wants_usage: bool) -> str:
    events = text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(event.removeprefix("data: ")) for event in events[:-1]]
    assert {(chunk.object, chunk.model) for chunk in chunks} == {("chat.completion.chunk", MODEL)}
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert choices[-1].finish_reason in ("stop", "length")
    assert (chunks[-1].usage is not None) == wants_usage
    return "".join(choice.delta.content or "" for choice in choices)


@pytest.mark.parametrize("recording", ACCEPTED, ids=str)
def test_requests_of_clients_are_answered(server: Server, recording: Recording):
    status, kind, text = send(server, recording)
    assert status == 200, text
    if recording.body.get("stream"):
        assert kind.startswith("text/event-stream")
        answer = read_stream(text, bool((recording.body.get("stream_options") or {}).get("include_usage")))
    else:
        assert kind == "application/json"
        answer = read_whole(text)
    # fusion-nano knows the circle's color; agents' prompts are too much for it
    if recording.has_image and "Agent" not in recording.call and recording.body.get("temperature", 0) <= LIKELY:
        asks_sky = "sky" in json.dumps(recording.body["messages"][-1])
        assert asks_sky or answer == "red"
    assert answer


@pytest.mark.parametrize("recording", REFUSED, ids=str)
def test_what_is_not_there_is_named(server: Server, recording: Recording):
    status, _, text = send(server, recording)
    error = json.loads(text)["error"]
    if recording.refused == "path":
        assert status == 404
        assert RESPONSES in error["message"] and CHAT in error["message"]
        assert "set_default_openai_api('chat_completions')" in error["message"]
    else:
        assert (status, error["param"]) == (400, recording.refused), text
        assert error["message"].startswith(f"{recording.refused} is ")


def test_every_client_is_recorded_with_text_image_stream_and_turns():
    """The fixtures hold what they are for."""
    for file in FOLDER.glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        bodies = [request["body"] for request in content["requests"] if "refused" not in request]
        assert any(IMAGE_MARK not in json.dumps(body) for body in bodies), file
        assert any(IMAGE_MARK in json.dumps(body) for body in bodies), file
        assert any(body.get("stream") for body in bodies), file
        assert any(len(body["messages"]) > 2 for body in bodies), file
        assert content.get("packages") or file.stem == "by_hand"


def test_the_guide_names_each_client_with_its_version():
    guide = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for file in FOLDER.glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        for name, version in content.get("packages", {}).items():
            assert f"{name} {version}" in guide
