"""Requests to a server that fails in every way: what is tried again, what is given up, where no key appears."""

import asyncio
import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.helpers.http_server import HttpServer, Response
from tests.helpers.openai_server import Scripted, serve

from fusion_hf.common.endpoint_client import EndpointClient
from fusion_hf.common.endpoints import CHAT, EndpointUnavailable, RequestRejected, check_key, endpoint_url
from fusion_hf.common.errors import InputError

KEY = "sk-very-secret"
VARIABLE = "TEST_ENDPOINT_KEY"
QUESTION = {"messages": [{"role": "user", "content": "what?"}]}
DEAD = "http://127.0.0.1:9/v1/models"  # a port of this machine that nobody listens at

Ask = Callable[..., list[Any]]


def writer(payload: Any) -> str:
    return "this"


def make_client(patience: int = 4, key: str | None = None, timeout: float = 5.0, **settings: Any) -> EndpointClient:
    return EndpointClient(key, timeout, patience, **{"first_pause": 0.01, "retries_timeouts": True, **settings})


def ask_in_coroutines(client: EndpointClient, url: str, *payloads: dict[str, Any]) -> list[Any]:
    async def run() -> list[Any]:
        results = await asyncio.gather(
            *(client.ask_async(url, payload) for payload in payloads), return_exceptions=True
        )
        await client.close()
        return results

    return asyncio.run(run())


def ask_in_threads(client: EndpointClient, url: str, *payloads: dict[str, Any]) -> list[Any]:
    def one(payload: dict[str, Any]) -> Any:
        try:
            return client.ask(url, payload)
        except (RequestRejected, EndpointUnavailable) as error:
            return error

    with ThreadPoolExecutor(len(payloads)) as threads:
        return list(threads.map(one, payloads))


@pytest.fixture(params=[ask_in_coroutines, ask_in_threads])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Answers or errors, of all requests at a time."""
    return request.param


def chat(server: Scripted | HttpServer) -> str:
    return endpoint_url(server.url, CHAT)


@pytest.mark.parametrize("fault", ["429!", "500", "503", "drop", "half", "slow"])
def test_what_passes_is_tried_again(ask: Ask, fault: str):
    script = Scripted(writer, faults=lambda payload, repeat: fault if repeat < 2 else None)
    with serve(script):
        (answer,) = ask(make_client(timeout=0.3), chat(script), QUESTION)
    assert answer["choices"][0]["message"]["content"] == "this"
    assert len(script.requests) == 3


def test_who_is_late_is_tried_again_only_if_told_so(ask: Ask):
    script = Scripted(writer, faults=lambda payload, repeat: "slow")
    with serve(script):
        (error,) = ask(make_client(timeout=0.2, retries_timeouts=False), chat(script), QUESTION)
    assert isinstance(error, EndpointUnavailable) and str(error).endswith("does not answer: no response in 0.2 s")
    assert len(script.requests) == 1


def test_pauses_grow(ask: Ask):
    script = Scripted(writer, faults=lambda payload, repeat: "429!" if repeat < 3 else None)  # which asks for none
    with serve(script):
        begin = time.monotonic()
        ask(make_client(first_pause=0.1), chat(script), QUESTION)
    assert time.monotonic() - begin > 0.5 * (0.1 + 0.2 + 0.4)


def test_a_pause_ends_when_nobody_waits_any_more():
    stop, begin = threading.Event(), time.monotonic()
    stop.set()
    with pytest.raises(EndpointUnavailable, match=r"does not answer: connection failed \(ConnectError: [^)]+\)$"):
        make_client(first_pause=30.0).ask(DEAD, stop=stop)
    assert time.monotonic() - begin < 10


def test_a_server_that_answers_nobody_is_unavailable(ask: Ask):
    script = Scripted(writer, faults=lambda payload, repeat: "500")
    with serve(script):
        (error,) = ask(make_client(), chat(script), QUESTION)
    assert isinstance(error, EndpointUnavailable) and "HTTP 500 in 4 tries" in str(error)
    (error,) = ask(make_client(), chat(script), QUESTION)  # nobody listens any more
    assert isinstance(error, EndpointUnavailable) and "connection failed" in str(error)


def test_a_request_that_fails_while_others_are_answered_is_rejected(ask: Ask):
    poison = {**QUESTION, "seed": 13}
    failed = threading.Event()

    def fail(payload: dict[str, Any], repeat: int) -> str | None:
        if payload.get("seed") != 13:
            failed.wait(5)
            return None
        if repeat:
            failed.set()
        return "500"

    with serve(Scripted(writer, faults=fail)) as script:
        error, answer = ask(make_client(first_pause=0.1), chat(script), poison, QUESTION)
    assert isinstance(error, RequestRejected) and str(error) == "HTTP 500 in 4 tries" and "choices" in answer


@pytest.mark.parametrize(("since_begin", "kind"), [(True, RequestRejected), (False, EndpointUnavailable)])
def test_an_answer_before_the_first_failure(ask: Ask, since_begin: bool, kind: type[Exception]):
    """Others were answered while the request was on its way, and nobody afterwards."""
    answered = threading.Event()

    def fail(payload: dict[str, Any], repeat: int) -> str | None:
        if payload.get("seed") != 13:
            answered.set()
            return None
        answered.wait(5)
        time.sleep(0.2)  # until the client has the other answer
        return "500"

    with serve(Scripted(writer, faults=fail)) as script:
        client = make_client(alive_since_begin=since_begin)
        error, answer = ask(client, chat(script), {**QUESTION, "seed": 13}, QUESTION)
    assert isinstance(error, kind) and "choices" in answer


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("400", RequestRejected), ("422", RequestRejected), ("302", RequestRejected), ("huge", RequestRejected),
        ("404", EndpointUnavailable),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_not_tried_again(ask: Ask, fault: str, kind: type[Exception]):
    script = Scripted(writer, faults=lambda payload, repeat: fault)
    with serve(script):
        (error,) = ask(make_client(), chat(script), QUESTION)
    assert isinstance(error, kind)
    assert len(script.requests) == 1


def test_nobody_is_sent_elsewhere(ask: Ask):
    with (
        serve(Scripted(writer)) as script,
        HttpServer(lambda request: Response(status=307, headers={"Location": chat(script)})) as mover,
    ):
        (error,) = ask(make_client(), chat(mover), QUESTION)
    assert isinstance(error, RequestRejected) and "HTTP 307" in str(error)
    assert script.requests == []


def test_a_body_that_comes_byte_by_byte_ends_in_time(ask: Ask):
    ended = threading.Event()

    def dribble() -> Iterator[bytes]:
        while not ended.wait(0.05):
            yield b" "

    with HttpServer(lambda request: Response(dribble(), headers={"Content-Length": "1000000"})) as server:
        (error,) = ask(make_client(1, timeout=0.3), chat(server), QUESTION)
        ended.set()
    assert "no response in 0.3 s" in str(error)


def test_a_body_that_grows_when_it_is_unpacked_is_bounded(ask: Ask):
    bomb = Response(gzip.compress(json.dumps({"junk": "x" * 2**26}).encode()), headers={"Content-Encoding": "gzip"})
    with HttpServer(lambda request: bomb) as server:
        (error,) = ask(make_client(), chat(server), QUESTION)
    assert isinstance(error, RequestRejected) and "more than" in str(error)


def test_half_a_character_reaches_the_server(ask: Ask):
    with serve(Scripted(writer)) as script:
        ask(make_client(), chat(script), {"messages": [{"role": "user", "content": "a \ud800 b"}]})
    assert script.requests[0]["messages"][0]["content"] == "a \ud800 b"


def test_a_proxy_of_the_environment_is_used_unless_it_says_otherwise(ask: Ask, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve(Scripted(writer)) as script, HttpServer(lambda request: Response.json({"from": "the proxy"})) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        (answer,) = ask(make_client(), "http://nowhere.invalid/v1/x", QUESTION)
        assert answer == {"from": "the proxy"} and [request.path for request in proxy.requests] == [
            "http://nowhere.invalid/v1/x"
        ]
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        (answer,) = ask(make_client(), chat(script), QUESTION)
        assert "choices" in answer and len(proxy.requests) == 1
    monkeypatch.setenv("http_proxy", "strange://host")
    with pytest.raises(InputError, match="proxy"):
        make_client().ask(DEAD)


@pytest.mark.parametrize("url", ["http://[::1/v1", f"http://{'a' * 70}.invalid/v1", "http://\u2028/v1"])
def test_an_address_that_leads_nowhere(ask: Ask, url: str):
    (error,) = ask(make_client(1), url, QUESTION)
    assert isinstance(error, EndpointUnavailable) and "connection failed" in str(error)


def test_the_key_goes_to_the_server_and_nowhere_else(ask: Ask, monkeypatch: pytest.MonkeyPatch):
    script = Scripted(writer, key=KEY)
    with serve(script):
        monkeypatch.setenv(VARIABLE, f" {KEY}\n")
        (answer,) = ask(make_client(key=VARIABLE), chat(script), QUESTION)
        assert "choices" in answer
        client = make_client(key=VARIABLE)
        for wrong, reason in (("sk-wrong-but-secret", "HTTP 401"), ("sk-no\nheader", "connection failed")):
            monkeypatch.setenv(VARIABLE, wrong)
            (error,) = ask(client, chat(script), QUESTION)
            assert isinstance(error, EndpointUnavailable) and reason in str(error)
            assert "sk-" not in f"{error} {error!r} {client!r} {vars(client)}"  # though server and library repeat it


@pytest.mark.parametrize(("value", "message"), [("", f"{VARIABLE} .*is not set"), ("ü", "ASCII"), ("a\nb", "ASCII")])
def test_what_is_no_key_is_named(monkeypatch: pytest.MonkeyPatch, value: str, message: str):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(InputError, match=message):
        check_key(VARIABLE)
    check_key(None)


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
