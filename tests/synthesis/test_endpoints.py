"""Requests to a server that fails in every way: what is tried again, what is given up, where no key appears."""

import asyncio
import time
from typing import Any

import pytest
from tests.synthesis.server import Scripted, serve

from fusion_hf.common.endpoints import CHAT, Refused, Unavailable, check_key, endpoint_url
from fusion_hf.common.errors import InputError
from fusion_hf.synthesis.endpoints import Poster

KEY = "sk-very-secret"
VARIABLE = "TEST_SYNTHESIS_KEY"
QUESTION = {"messages": [{"role": "user", "content": "what?"}]}


def writer(payload: Any) -> str:
    return "this"


def make_poster(script: Scripted, patience: int = 4, key: str | None = None, timeout: float = 5.0) -> Poster:
    return Poster(endpoint_url(script.url, CHAT), key, timeout, patience, first_pause=0.01)


def ask(poster: Poster, *payloads: dict[str, Any]) -> list[Any]:
    """Answers or errors, of all requests at a time."""

    async def run() -> list[Any]:
        results = await asyncio.gather(*map(poster.post, payloads), return_exceptions=True)
        await poster.close()
        return results

    return asyncio.run(run())


@pytest.mark.parametrize("fault", ["429!", "500", "503", "drop", "half", "slow"])
def test_what_passes_is_tried_again(fault: str):
    script = Scripted(writer, faults=lambda payload, repeat: fault if repeat < 2 else None)
    with serve(script):
        (answer,) = ask(make_poster(script, timeout=0.3), QUESTION)
    assert answer["choices"][0]["message"]["content"] == "this"
    assert len(script.requests) == 3


def test_pauses_grow_until_the_server_says_how_long():
    script = Scripted(writer, faults=lambda payload, repeat: "500" if repeat < 3 else None)
    with serve(script):
        poster = make_poster(script)
        poster.first_pause = 0.1
        begin = time.monotonic()
        ask(poster, QUESTION)
    assert time.monotonic() - begin > 0.5 * (0.1 + 0.2 + 0.4)


def test_a_server_that_answers_nobody_is_unavailable():
    script = Scripted(writer, faults=lambda payload, repeat: "500")
    with serve(script):
        (error,) = ask(make_poster(script), QUESTION)
    assert isinstance(error, Unavailable) and "HTTP 500 in 4 tries" in str(error)
    (error,) = ask(make_poster(script), QUESTION)  # nobody listens any more
    assert isinstance(error, Unavailable) and "connection failed" in str(error)


def test_a_request_that_fails_while_others_are_answered_is_refused():
    poison = {**QUESTION, "seed": 13}
    script = Scripted(writer, faults=lambda payload, repeat: "500" if payload.get("seed") == 13 else None)
    with serve(script):
        poster = make_poster(script)
        error, answer = ask(poster, poison, QUESTION)
    assert isinstance(error, Refused) and "choices" in answer


@pytest.mark.parametrize(
    ("fault", "kind"), [("400", Refused), ("422", Refused), ("huge", Refused), ("404", Unavailable)]
)
def test_what_does_not_pass_is_not_tried_again(fault: str, kind: type[Exception]):
    script = Scripted(writer, faults=lambda payload, repeat: fault)
    with serve(script):
        (error,) = ask(make_poster(script), QUESTION)
    assert isinstance(error, kind)
    assert len(script.requests) == 1


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch: pytest.MonkeyPatch):
    script = Scripted(writer, key=KEY)
    with serve(script):
        monkeypatch.setenv(VARIABLE, f" {KEY}\n")
        (answer,) = ask(make_poster(script, key=VARIABLE), QUESTION)
        assert "choices" in answer
        monkeypatch.setenv(VARIABLE, "sk-wrong-but-secret")
        poster = make_poster(script, key=VARIABLE)
        (error,) = ask(poster, QUESTION)
    assert isinstance(error, Unavailable) and "HTTP 401" in str(error)
    assert "sk-" not in f"{error} {error!r} {poster!r}"  # though the server repeats it


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(InputError, match=f"has no {VARIABLE}"):
        check_key(VARIABLE)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1/chat/completions"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1/chat/completions"),
        ("https://host/v1beta/openai", "https://host/v1beta/openai/chat/completions"),
    ],
)
def test_addresses(base: str, expected: str):
    assert endpoint_url(base, CHAT) == expected
