"""What real clients send by default is answered in the shape that they read, and what cannot be done is named."""

import json

import pytest
from tests.docs.markdown import ROOT
from tests.helpers.client_requests import FOLDER, IMAGE_MARK, ClientRequest, answer_to, read_recordings, send
from tests.helpers.serving import Server

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
LIKELY = 0.01  # drawn with less, an answer is the most likely one


RECORDINGS = list(read_recordings())
ACCEPTED = [recording for recording in RECORDINGS if recording.refused is None]
REFUSED = [recording for recording in RECORDINGS if recording.refused is not None]


@pytest.mark.parametrize("recording", ACCEPTED, ids=str)
def test_requests_of_clients_are_answered(server: Server, recording: ClientRequest):
    answer = answer_to(server, recording)
    # fusion-nano knows the circle's color; agents' prompts are too much for it
    if recording.has_image and "Agent" not in recording.call and recording.body.get("temperature", 0) <= LIKELY:
        asks_sky = "sky" in json.dumps(recording.body["messages"][-1])
        assert asks_sky or answer == "red"
    assert answer


@pytest.mark.parametrize("recording", REFUSED, ids=str)
def test_what_is_not_there_is_named(server: Server, recording: ClientRequest):
    status, _, text = send(server, recording)
    error = json.loads(text)["error"]
    if recording.refused == "path":
        assert status == 404
        assert RESPONSES in error["message"] and CHAT in error["message"]
        assert "set_default_openai_api('chat_completions')" in error["message"]
    else:
        assert (status, error["param"]) == (400, recording.refused), text
        assert error["message"].startswith(f"`{recording.refused}` must be ")


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
    guide = (ROOT / "docs" / "serving_clients.md").read_text(encoding="utf-8")
    for file in FOLDER.glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        for name, version in content.get("packages", {}).items():
            assert f"{name} {version}" in guide
