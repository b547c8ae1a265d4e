"""What a server gives to many clients at once: places, a queue with an end, and nothing to those who are gone."""

import asyncio
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from tests.helpers.serving import CHUNK, QUESTION, SECONDS, Server, ask, chat_request, red_circle, run_server, user

from fusion_hf.serving.app import unless_gone

LONG = 700  # tokens: seconds
HURRY = 0.5  # of the time of a whole answer, within which a slot must be free that nobody waits for
LONGEST = 900  # tokens
SHARING = 4  # answers that decode together
DRAWN = {"temperature": 2.0, "seed": 1}  # so that there is text all the time


@pytest.fixture(scope="module")
def narrow(endless_model: Path) -> Iterator[Server]:
    """One answer at a time, and nobody may wait."""
    arguments = ("--concurrency", 1, "--queue-length", 0, "--max-seconds", 60, "--max-image-bytes", 1000)
    with run_server("--model", endless_model, *arguments) as running:
        yield running


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_full_queue_and_disconnected_clients(narrow: Server, stream: bool):
    client = narrow.client()
    whole = seconds_of(narrow, LONG)
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=SECONDS) as connection:
        connection.sendall(chat_request(user("tell me"), **DRAWN, max_tokens=LONG, stream=stream))
        narrow.wait_for(running=1)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client, user("tell me"))
        assert refused.value.response.headers["retry-after"] == "1"
        assert "1 requests are being answered and 0 are waiting" in refused.value.body["message"]
        received = b""
        while stream and b"data: " not in received:
            received += connection.recv(CHUNK) or pytest.fail("the server has closed the connection")
    gone = time.monotonic()
    narrow.wait_for(running=0, waiting=0)
    assert ask(client, user("tell me"), max_tokens=1).usage.completion_tokens == 1
    assert time.monotonic() - gone < HURRY * whole


def seconds_of(server: Server, tokens: int) -> float:
    """What an answer of so many tokens takes on this machine now."""
    begin = time.monotonic()
    assert ask(server.client(), user("tell me"), max_tokens=tokens).usage.completion_tokens == tokens
    return time.monotonic() - begin


def test_work_that_swallows_a_cancellation_is_cancelled_again():
    """As `asyncio.wait_for` does before Python 3.12, if what it waits for ends in the same moment."""
    swallowed = []

    async def work() -> None:
        try:
            await asyncio.sleep(SECONDS)
        except asyncio.CancelledError:
            swallowed.append(1)
        await asyncio.sleep(SECONDS)

    async def receive() -> dict[str, str]:
        await asyncio.sleep(0)  # let the work begin
        return {"type": "http.disconnect"}

    begin = time.monotonic()
    asyncio.run(unless_gone(receive, work()))
    assert swallowed == [1]
    assert time.monotonic() - begin < SECONDS / 4


def test_openai_client_comes_again(narrow: Server):
    """The client of OpenAI waits and asks again by itself."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(ask, narrow.client(), user("tell me"), max_tokens=100)
        narrow.wait_for(running=1)
        patient = narrow.client().with_options(max_retries=5)
        assert ask(patient, user("tell me"), max_tokens=1).usage.completion_tokens == 1
        assert pending.result().usage.completion_tokens == 100


def test_image_bytes_option(narrow: Server):
    with pytest.raises(openai.APIStatusError) as refused:
        ask(narrow.client(), user(QUESTION, red_circle() + "A" * 2000))
    assert refused.value.status_code == 413


@pytest.mark.slow
def test_long_answers_keep_nobody_waiting(endless_model: Path):
    """A short answer comes while long ones, begun before, are still made; who waits longest is next."""
    with run_server("--model", endless_model, "--concurrency", 2) as server, ThreadPoolExecutor(4) as pool:
        client = server.client()
        long = pool.submit(ask, client, user("tell me"), max_tokens=LONG)
        server.wait_for(running=1)
        ask(client, user("tell me"), max_tokens=5)
        assert not long.done()
        second = pool.submit(ask, client, user("tell me"), max_tokens=LONG)
        server.wait_for(running=2)
        ends: list[int] = []
        waiting = []
        for index in range(2):
            waiting.append(pool.submit(ask, client, user("tell me"), max_tokens=5))
            waiting[-1].add_done_callback(lambda _, index=index: ends.append(index))
            server.wait_for(waiting=index + 1)
        for answer in (*waiting, long, second):
            assert answer.result().choices[0].finish_reason == "length"
        assert ends == [0, 1]


@pytest.mark.slow
def test_waiting_clients_that_leave(endless_model: Path):
    with run_server("--model", endless_model, "--concurrency", 1) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, server.client(), user("tell me"), max_tokens=LONG)
        server.wait_for(running=1)
        with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
            connection.sendall(chat_request(user("tell me"), max_tokens=LONG))
            server.wait_for(running=1, waiting=1)
        server.wait_for(running=1, waiting=0)
        assert not first.done()
        assert first.result().usage.completion_tokens == LONG


@pytest.mark.slow
def test_time_limit(endless_model: Path, narrow: Server):
    """An answer ends with what there is; a request whose turn does not come is told so."""
    # answers that decode together are not made in half the time of one alone
    limit = max(1, int(seconds_of(narrow, LONGEST) / 2))
    with run_server("--model", endless_model, "--concurrency", SHARING, "--max-seconds", limit) as server:
        client = server.client()
        with ThreadPoolExecutor(SHARING + 1) as pool:
            begin = time.monotonic()
            first = [pool.submit(ask, client, user("tell me"), max_tokens=LONGEST) for _ in range(SHARING)]
            server.wait_for(running=SHARING)
            second = pool.submit(ask, client, user("tell me"), max_tokens=LONGEST)
            for cut in (answer.result() for answer in first):
                assert cut.choices[0].finish_reason == "length"
                assert 0 < cut.usage.completion_tokens < LONGEST
            status = None
            try:
                second.result()
            except openai.InternalServerError as error:
                status = error.status_code
            assert time.monotonic() - begin < 4 * limit
            assert status in (None, 503)
        assert ask(client, user("tell me"), max_tokens=1).usage.completion_tokens == 1


@pytest.mark.slow
def test_prompt_option(endless_model: Path):
    with run_server(
        "--model", endless_model, "--max-prompt-tokens", 50, "--max-new-tokens", 7, "--query-len", 4
    ) as server:
        client = server.client()
        with pytest.raises(openai.BadRequestError, match="at most 50 "):
            ask(client, user(QUESTION, red_circle()), extra_body={"query_len": 16})
        for name in ("max_tokens", "max_completion_tokens"):
            reply = ask(client, user(QUESTION), **{name: 4096})
            assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (7, "length")
        assert ask(client, user("sky?")).usage.prompt_tokens < 50
