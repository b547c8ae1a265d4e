"""Whatever a client sends that it should not is answered with 4xx in OpenAI's form, and the server goes on."""

import io
import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache
from typing import Any

import openai
import pytest
from PIL import Image
from tests.helpers.image_files import encoded, png_claiming
from tests.helpers.serving import (
    IMAGE_FILE,
    MODEL,
    QUESTION,
    ImageHost,
    Server,
    ask,
    data_uri,
    red_circle,
    user,
)

from fusion_hf.model.image_processing_fusion import FusionImageProcessor

MEGABYTE = 2**20
BODY = 50 * MEGABYTE
BOMB_SIDE = 60_000
GREY_BOMB_SIDE = 20_000  # pixels that compress to a few hundred kilobytes
DEPTH = 100_000
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'


@pytest.fixture(autouse=True)
def alive(server: Server, client: openai.OpenAI) -> Iterator[None]:
    """After each test the server answers right, nothing is left running, and its log has no traceback."""
    yield
    assert ask(client, user(QUESTION, red_circle())).choices[0].message.content == "red"
    server.wait_for(running=0, waiting=0)
    log = server.errors.read_text(encoding="utf-8")
    assert "Traceback" not in log and "ERROR" not in log


def request_of(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [user(QUESTION)], **changes}


def post(server: Server, body: bytes, kind: str = "application/json") -> tuple[int, dict[str, Any]]:
    """Status and error of a request."""
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["error"]


def refused(server: Server, *parts: str, status: int = 400, **changes: Any) -> dict[str, Any]:
    """The error of a request that is refused, in words that have `parts`."""
    code, error = post(server, json.dumps(request_of(**changes)).encode())
    assert code == status, error
    for part in parts:
        assert part in error["message"]
    assert len(error["message"]) < 1000
    assert " at 0x" not in error["message"]  # nothing of the process's memory
    assert error["type"] == "invalid_request_error"
    return error


def png(side: int) -> bytes:
    return encoded(Image.new("1", (side, side)))


# bodies


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model": "\xff\xfe"}', "not valid JSON in UTF-8"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"[" * DEPTH + b"]" * DEPTH, "nested too deep"),
        (b'{"a":' * DEPTH + b"1" + b"}" * DEPTH, "nested too deep"),
        (b"[1,2]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"{}", "`model` must be"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"seed": ' + b"1" * 10_000 + b"}", "not valid JSON"),
        (b'{"a": [' + b"0," * 3 * MEGABYTE + b"0]}", "must have at most"),
        (b"\x00" * MEGABYTE, "not valid JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_broken_bodies(server: Server, body: bytes, part: str):
    status, error = post(server, body)
    assert status == 400
    assert part in error["message"]


def test_wrong_content_type(server: Server):
    body = json.dumps(request_of()).encode()
    for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        assert post(server, body, kind)[0] == 415
    assert post(server, body, "Application/JSON; charset=utf-8")[0] == 200


def test_large_bodies(server: Server):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    before = server.rss()
    declared = server.send(head + b"Content-Length: %d\r\n\r\n" % BODY + bytes(BODY))
    piece = b"%x\r\n" % MEGABYTE + bytes(MEGABYTE) + b"\r\n"
    chunked = server.send(head + b"Transfer-Encoding: chunked\r\n\r\n" + piece * (BODY // MEGABYTE) + b"0\r\n\r\n")
    for answer in (declared, chunked):
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"The body of a request must have at most" in answer
    lying = server.send(head + b"Content-Length: 12\r\n\r\n{}", then_end=True)  # it ends before
    assert lying == b""
    for wrong in (b"-1", b"1e3", b"many"):
        assert server.send(head + b"Content-Length: " + wrong + b"\r\n\r\n{}").startswith(b"HTTP/1.1 400")
    assert server.rss() - before < BODY


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 50,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000,
        b"\r\n\r\n",
        b"G",
    ],
    ids=["tls", "headers", "empty", "begin"],
)
def test_no_http(server: Server, content: bytes):
    answer = server.send(content, then_end=True)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")


def test_other_paths(server: Server):
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/completions", 404),
        ("GET", "/docs", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/models/../../../etc/passwd", 404),
        ("GET", "/" + "x" * 10_000, 404),
    ):
        answer = server.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert answer.startswith(f"HTTP/1.1 {status}".encode()), answer
        assert b'"invalid_request_error"' in answer


# fields


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": 7}, ("`model` must be", "got 7", MODEL)),
        ({"messages": "hello"}, ("`messages` must be", "got 'hello'", "a list")),
        ({"messages": []}, ("`messages` must be", "got []")),
        ({"messages": [7]}, ("`messages[0]` must be", "got 7")),
        (
            {"messages": [{"role": "root", "content": "x"}]},
            ("`messages[0].role` must be", "got 'root'", "system, developer, user"),
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, ("messages[0].role",)),
        ({"messages": [{"role": "user"}]}, ("`messages[0].content` must be", "got None")),
        ({"messages": [{"role": "user", "content": {"text": "x"}}]}, ("messages[0].content",)),
        (
            {"messages": [{"role": "user", "content": [7]}]},
            ("`messages[0].content[0].type` must be", "got 7", "text or image_url"),
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, ("'input_audio'",)),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]},
            ("[0].text` must be a text, got 7",),
        ),
        ({"messages": [{"role": "user", "content": " "}]}, ("must have a text",)),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, ("invalid character",)),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
            ("`messages[0].tool_call_id` must be", "got '1'"),
        ),
        ({"messages": [user(QUESTION), {"role": "assistant", "content": "red"}]}, ("messages[1].role", "question")),
        (
            {"messages": [{"role": "assistant", "content": "red"}, user(QUESTION)]},
            ("`messages[0].role` must be", "got 'assistant'"),
        ),
        (
            {"messages": [user("a"), {"role": "system", "content": "b"}, user("c")]},
            ("`messages[1].role` must be", "got 'system'"),
        ),
        ({"messages": [{**user(QUESTION, "data:,"), "role": "system"}]}, ("'image_url'", "role system")),
        ({"max_tokens": 0}, ("`max_tokens` must be", "got 0", "at least 1")),
        ({"max_tokens": -1}, ("`max_tokens` must be", "got -1", "at least 1")),
        ({"max_tokens": "7"}, ("`max_tokens` must be", "got '7'")),
        ({"max_tokens": True}, ("`max_tokens` must be", "got True")),
        (
            {"max_tokens": 7, "max_completion_tokens": 8},
            ("`max_tokens` must be", "got 7", "equal to `max_completion_tokens` (8)"),
        ),
        ({"temperature": -1}, ("`temperature` must be", "got -1", "0 to 2")),
        ({"temperature": "hot"}, ("`temperature` must be", "got 'hot'")),
        ({"temperature": 10**400}, ("`temperature` must be", "got 1000")),
        ({"temperature": 1, "top_p": 0}, ("`top_p` must be", "got 0")),
        ({"top_p": 0.5}, ("`top_p` must be", "got 0.5", "temperature")),
        ({"seed": 2**70}, ("`seed` must be", "got 1180591620717411303424")),
        ({"seed": 1.5}, ("`seed` must be", "got 1.5")),
        ({"stop": ["a"] * 5}, ("`stop` must be", "got ['a', 'a'", "up to 4")),
        ({"stop": ""}, ("`stop` must be", "got ''")),
        ({"stop": [7]}, ("`stop` must be", "got [7]")),
        ({"stop": "x" * 10_000}, ("`stop` must be", "got 'xxxx")),
        ({"stream": "yes"}, ("`stream` must be", "got 'yes'", "true or false")),
        ({"stream_options": {"include_usage": True}}, ("stream_options", "with stream")),
        ({"stream": True, "stream_options": {"include_usage": 1}}, ("include_usage` must be", "got 1")),
        ({"stream": True, "stream_options": {"more": 1}}, ("`stream_options.more` must be", "got 1")),
        ({"query_len": 10}, ("`query_len` must be", "got 10", "perfect square")),
        ({"query_len": 0}, ("`query_len` must be", "got 0")),
        ({"query_len": "4"}, ("`query_len` must be", "got '4'")),
        ({"query_len": 4.0}, ("`query_len` must be", "got 4.0")),
        ({"query_len": 10**40}, ("query_len", "10000000")),
        ({"query_len": 10**6}, ("query_len", "1000000", "maximum")),
        ({"image_token_grid": 10**6}, ("image_token_grid", "1000000")),
        ({"n": 2}, ("`n` must be", "got 2", "must be 1")),
        ({"n": True}, ("`n` must be", "got True")),
        ({"presence_penalty": 0.5}, ("`presence_penalty` must be", "got 0.5", "must be 0")),
        ({"logprobs": True}, ("`logprobs` must be", "got True", "must be false")),
        ({"response_format": {"type": "json_object"}}, ("response_format", '{"type": "text"}')),
        ({"tools": [{"type": "function"}]}, ("tools",)),
        ({"num_beams": 4}, ("`num_beams` must be", "got 4", "must be 1")),
        ({"number_of_beams": 1}, ("`number_of_beams` must be", "got 1", "left out", "query_len")),
        ({"x" * 10**6: [[[[[[[[[[0] * 10**4]]]]]]]]]}, ("left out",)),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[0],
)
def test_wrong_fields(server: Server, changes: dict[str, Any], parts: tuple[str, ...]):
    refused(server, *parts, **changes)


def test_harmless_fields(client: openai.OpenAI):
    reply = ask(
        client,
        user(QUESTION, red_circle()),
        n=1,
        presence_penalty=0.0,
        frequency_penalty=0,
        logprobs=False,
        response_format={"type": "text"},
        user="somebody",
        metadata={"a": "b"},
        tool_choice="none",
        top_p=1.0,
        temperature=0,
    )
    assert reply.choices[0].message.content == "red"


def test_unknown_model(server: Server):
    error = refused(server, "`model` must be", "got 'gpt-4o'", "'fusion-nano'", status=404, model="gpt-4o")
    assert (error["param"], error["code"]) == ("model", "model_not_found")


ENDLESS = ["word " * 5000, "x" * 10**7, "<image>" * 10**6, "\u0a15" * 10**6, "<|im_end|>" * 10**5]


@pytest.mark.parametrize("text", ENDLESS, ids=["words", "letters", "marks", "letters_of_3_bytes", "special_tokens"])
def test_endless_prompts(server: Server, text: str):
    assert refused(server, "tokens, got ", messages=[user(text)])["code"] == "context_length_exceeded"


def test_many_turns(server: Server):
    """Latent tokens of turns count: 1000 short questions are no short prompt."""
    turns = [user("a"), {"role": "assistant", "content": "b"}] * 1000
    refused(server, "at most 1023 tokens", messages=[*turns, user("a")])


# images


@cache
def broken_images() -> dict[str, bytes]:
    whole = IMAGE_FILE.read_bytes()
    jpeg = io.BytesIO()
    Image.open(IMAGE_FILE).convert("RGB").save(jpeg, "JPEG")
    return {
        "nothing": b"",
        "claimed": png_claiming(BOMB_SIDE),
        "zip_bomb": png_claiming(BOMB_SIDE, pixels=bytes(10 * MEGABYTE)),
        "grey_bomb": png(GREY_BOMB_SIDE),
        "truncated": whole[: len(whole) // 2],
        "head": whole[:20],
        "jpeg_head": jpeg.getvalue()[:200],
        "svg": SVG,
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "html": b"<html>",
        "noise": bytes(range(256)) * 100,
    }


@pytest.mark.parametrize("name", broken_images())
def test_broken_images(server: Server, name: str):
    before = server.rss()
    error = refused(server, "The image", messages=[user(QUESTION, data_uri(broken_images()[name]))])
    assert error["param"] == "messages.content.image_url.url"
    assert server.rss() - before < 100 * MEGABYTE


def test_pixels_are_limited_before_decoding(server: Server):
    side = math.isqrt(2**25) + 1
    assert side**2 < FusionImageProcessor.max_image_pixels
    refused(server, "pixels, more than max_image_pixels = 33554432", messages=[user(QUESTION, data_uri(png(side)))])


def test_huge_base64(server: Server):
    refused(server, "at most 10485760 bytes", status=413, messages=[user(QUESTION, data_uri(bytes(11 * MEGABYTE)))])


@pytest.mark.parametrize(
    "url",
    ["data:", "data:image/png,abc", "data:image/png;base64", "data:image/png;base64,!!!", "data:text/html;base64,AAAA",
     "data:image/png;base64,AAA", "data:image/png;base64,\u00e9"],
)  # fmt: skip
def test_broken_data_uris(server: Server, url: str):
    refused(server, "data URI", messages=[user(QUESTION, url)])


def test_two_images(server: Server):
    messages = [user(QUESTION, red_circle()), user(QUESTION, data_uri(png(2)))]
    refused(server, "at most 1 image, got 2", messages=messages)


def test_very_many_addresses(server: Server):
    """Telling images apart takes time in proportion to their number."""
    parts = [{"type": "image_url", "image_url": {"url": str(number)}} for number in range(2**14)]
    refused(server, "at most 1 image, got 16384", messages=[{"role": "user", "content": parts}])


def test_detail(server: Server):
    part = {"type": "image_url", "image_url": {"url": red_circle(), "detail": "most"}}
    message = {"role": "user", "content": [{"type": "text", "text": QUESTION}, part]}
    refused(server, "detail` must be", "got 'most'", '"auto" or "low" or "high"', messages=[message])


# addresses


@pytest.mark.parametrize(
    "url",
    [
        f"file://{IMAGE_FILE}",
        str(IMAGE_FILE),
        "docs/assets/red_circle.png",
        "ftp://127.0.0.1/red.png",
        "gopher://127.0.0.1/_GET",
        "jar:http://127.0.0.1!/",
        "//127.0.0.1/red.png",
        "http:red.png",
        "http:///red.png",
        "http://user:password@127.0.0.1/",
        "http://127.0.0.1:99999/",
        "http://[::1/",
        "http://127.0.0.1/a\r\nHost: evil",
        "http://127.0.0.1/ b",
        "http://127.0.0.1\u3002example/",
        "",
        "\x00",
    ],
)
def test_no_addresses(server: Server, url: str):
    refused(server, "The image", messages=[user(QUESTION, url)])


def test_unlisted_hosts(server: Server, image_host: ImageHost):
    before = len(image_host.requested)
    for host in ("example.com", "127.0.0.2", f"localhost:{image_host.port}", f"127.0.0.1.:{image_host.port}"):
        refused(server, "list of allowed image hosts", messages=[user(QUESTION, f"http://{host}/red.png")])
    assert len(image_host.requested) == before


PRIVATE = ("127.0.0.1", "[::1]", "169.254.169.254", "10.0.0.1", "localhost", "2130706433", "0x7f000001", "127.1")


@pytest.mark.parametrize("host", PRIVATE)
def test_listed_hosts_with_private_addresses(server: Server, host: str):
    for scheme in ("http", "https"):
        url = f"{scheme}://{host}/latest/meta-data"
        refused(server, "an address that is not public", messages=[user(QUESTION, url)])


@pytest.mark.parametrize("host", PRIVATE)
def test_redirects_to_private_addresses(server: Server, host: str, image_host: ImageHost):
    url = f"{image_host.url}/redirect/http://{host}/red.png"
    refused(server, "an address that is not public", messages=[user(QUESTION, url)])


def test_redirects_elsewhere(server: Server, image_host: ImageHost):
    for target in (f"file://{IMAGE_FILE}", "ftp://127.0.0.1/", "gopher://127.0.0.1/"):
        url = f"{image_host.url}/redirect/{target}"
        refused(server, "http or https", messages=[user(QUESTION, url)])
    url = f"{image_host.url}/redirect/http://localhost:{image_host.port}/red.png"
    refused(server, "list of allowed image hosts", messages=[user(QUESTION, url)])
    refused(server, "more than 3 times", messages=[user(QUESTION, f"{image_host.url}/again")])


def test_hosts_that_misbehave(server: Server, image_host: ImageHost):
    before = server.rss()
    refused(server, "must have at most", status=413, messages=[user(QUESTION, f"{image_host.url}/endless")])
    refused(server, "answers 404", messages=[user(QUESTION, f"{image_host.url}/status/404")])
    refused(server, "compressed", messages=[user(QUESTION, f"{image_host.url}/compressed")])
    assert server.rss() - before < 100 * MEGABYTE
