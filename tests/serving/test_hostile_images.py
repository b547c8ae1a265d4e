"""Images that cost much to decode hold up nobody, and a server that is told to end does not wait for them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from tests.helpers.costly_images import flat, one_bit_png
from tests.helpers.image_files import jpeg_of_many_scans
from tests.helpers.serving import (
    POLL_SECONDS,
    QUESTION,
    STOP_SECONDS,
    Server,
    ask,
    chat_request,
    data_uri,
    red_circle,
    rss_of,
    run_server,
    start_server,
    user,
)

SIDE = 5792  # as many pixels as the server allows by default
COSTLY_SIDE = 12_000  # two seconds of a processor's time
COSTLY = ("--max-image-pixels", COSTLY_SIDE**2)
REQUESTS = 200
HOSTILE = 4
PATIENCE = 0.5  # seconds
MEGABYTE = 2**20
# beside the requests' own files: answers, and four decoders with what the guide says of them
SERVER_BYTES = 200 * MEGABYTE
DECODER_BYTES = 1100 * MEGABYTE
END_SECONDS = 15
# prints the longest time that `/health` took, until its standard input ends
WATCH = """
import sys, threading, time, urllib.request
is_over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()
longest = 0.0
while not is_over.wait(0.05):
    begin = time.monotonic()
    urllib.request.urlopen(sys.argv[1] + "/health", timeout=60).read()
    longest = max(longest, time.monotonic() - begin)
print(longest)
"""


def costly() -> str:
    return data_uri(one_bit_png(COSTLY_SIDE))


@pytest.fixture(scope="module")
def narrow() -> Iterator[Server]:
    """One answer at a time, and one decoder's second for an image."""
    with run_server("--concurrency", 1, "--queue-length", 1, "--max-image-seconds", 1, *COSTLY) as running:
        ask(running.client(), user(QUESTION, red_circle()))
        yield running


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + STOP_SECONDS
    while any(rss_of(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(POLL_SECONDS)


def test_a_costly_image_is_refused_and_holds_up_nobody(narrow: Server):
    client = narrow.client()
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(ask, client, user(QUESTION, costly()))
        narrow.wait_for(running=0, waiting=1)
        assert ask(client, user(QUESTION)).choices[0].message.content  # it takes the only place at the model
        assert not pending.done()
        with pytest.raises(openai.BadRequestError, match="at most 1 s of processor time"):
            pending.result()
    assert ask(client, user(QUESTION, red_circle())).choices[0].message.content == "red"


def test_a_client_that_leaves_while_its_image_is_decoded(narrow: Server):
    with pytest.raises(openai.APITimeoutError):
        ask(narrow.client().with_options(timeout=PATIENCE), user(QUESTION, costly()))
    gone = time.monotonic()
    narrow.wait_for(running=0, waiting=0)
    assert time.monotonic() - gone < 1
    assert ask(narrow.client(), user(QUESTION, red_circle())).choices[0].message.content == "red"


@pytest.mark.slow
def test_the_deadline_of_a_request_holds_while_its_image_is_decoded():
    with run_server("--max-seconds", 1, "--max-image-seconds", 60, *COSTLY) as server:
        ask(server.client(), user(QUESTION))
        begin = time.monotonic()
        with pytest.raises(openai.InternalServerError) as refused:
            ask(server.client(), user(QUESTION, costly()))
        assert refused.value.status_code == 503
        assert time.monotonic() - begin < 2
        server.wait_for(running=0, waiting=0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_the_server_ends_while_images_are_decoded(number: signal.Signals, tmp_path: Path):
    images = [costly(), data_uri(jpeg_of_many_scans(SIDE, size=1_000_000))]
    arguments = ("--max-image-seconds", 600, *COSTLY)
    with start_server(*arguments, errors=tmp_path / "errors") as (process, server):
        client = server.client()
        ask(client, user(QUESTION, red_circle()))
        with ThreadPoolExecutor(HOSTILE) as pool:
            pending = [pool.submit(ask, client, user(QUESTION, images[index % 2])) for index in range(HOSTILE)]
            server.wait_for(running=0, waiting=HOSTILE)
            decoders = server.children()
            assert decoders
            os.kill(server.pid, number)
            begin = time.monotonic()
            process.wait(STOP_SECONDS)
            assert time.monotonic() - begin < END_SECONDS
            # a decoder that is done within the time for answers on their way is in time
            assert all(isinstance(answer.exception(), openai.APIError | None) for answer in pending)
        if number != signal.SIGKILL:  # else they end as soon as they have nobody to answer
            assert not any(map(rss_of, decoders))
            assert server.errors.read_text(encoding="utf-8") == ""
    wait_until_gone(decoders)


@contextmanager
def watch(server: Server, seen: dict[str, list[float]]) -> Iterator[None]:
    """Fills in the longest seconds of `/health`, and bytes of the server and of its decoders now and then."""
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.1):
            seen["server"].append(server.rss())
            seen["decoders"].append(sum(map(rss_of, server.children())))

    command = [sys.executable, "-c", WATCH, server.url]
    watcher = threading.Thread(target=look)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as process:
        watcher.start()
        try:
            yield
        finally:
            is_over.set()
            watcher.join()
            seen["health"].append(float(process.communicate()[0]))


@pytest.mark.slow
def test_200_requests_beside_hostile_images():
    """Also the record of what these cost: `pytest -rP` shows it."""
    hostile = [jpeg_of_many_scans(SIDE, size=170_000), flat("JPEG2000", SIDE), flat("WEBP", SIDE), one_bit_png(SIDE)]
    urls = list(map(data_uri, hostile))
    assert len(urls) == HOSTILE
    seen: dict[str, list[float]] = {"health": [], "server": [], "decoders": []}
    with run_server("--queue-length", REQUESTS + HOSTILE) as server:
        assert ask(server.client(), user(QUESTION, red_circle())).choices[0].message.content == "red"
        before, gate = server.rss(), threading.Barrier(REQUESTS + HOSTILE)

        def send(url: str) -> str:
            request = chat_request(user(QUESTION, url))  # light clients: they share the server's processors
            gate.wait()
            head, _, body = server.send(request).partition(b"\r\n\r\n")
            reply = json.loads(body)
            return reply["choices"][0]["message"]["content"] if b" 200 " in head else reply["error"]["message"]

        with watch(server, seen), ThreadPoolExecutor(REQUESTS + HOSTILE) as pool:
            answers = list(pool.map(send, urls + [red_circle()] * REQUESTS))
        assert answers[HOSTILE:] == ["red"] * REQUESTS
        assert "at most " in answers[0]
        server.wait_for(running=0, waiting=0)
    most = {name: max(values) for name, values in seen.items()}
    sys.stdout.write(
        f"/health: {most['health']:.2f} s; server: {before / MEGABYTE:.0f} to {most['server'] / MEGABYTE:.0f} MB; "
        f"decoders: {most['decoders'] / MEGABYTE:.0f} MB"
    )
    assert most["health"] < 1
    assert most["server"] - before < SERVER_BYTES
    assert most["decoders"] < HOSTILE * DECODER_BYTES
