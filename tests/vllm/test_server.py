"""`fusion-hf serve --engine vllm` as users start it, and as OpenAI's client asks it."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from tests.helpers.client_requests import answer_to, read_recordings
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
    run_server,
    start_server,
    stream_text,
    user,
)
from tests.helpers.vllm_models import CASES, Case, Reference, draw_image, write_random_model

from fusion_hf import FusionConfig, nano_path
from fusion_hf.inference import ChatModel, question_message
from fusion_hf.serving.fields import REQUEST

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4
ENGINE = ("--engine", "vllm", "--device", "auto", "--dtype", "float32")
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
KEY = "a secret"
MAX_NEW_TOKENS = 20


def messages_of(case: Case) -> list[dict[str, Any]]:
    """The case's messages as clients send them."""
    messages = []
    for message in case.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image_url", "image_url": {"url": data_uri(encoded(draw_image(str(case.color))))}}
                if part["type"] == "image"
                else part
                for part in content
            ]
        messages.append({"role": message["role"], "content": content})
    return messages


@pytest.fixture(scope="module", params=["llama", "phi3"])
def random_model(request, tmp_path_factory) -> Iterator[tuple[Reference, Server, str]]:
    folder = write_random_model(tmp_path_factory.mktemp("model"), request.param)
    with run_server(*ENGINE, "--model", folder, "--name", "random", "--concurrency", "5", **SETTINGS) as server:
        yield Reference(folder), server, "random"


def test_log_probabilities_of_every_prompt_at_once(random_model):
    reference, server, name = random_model

    def reply(case: Case) -> tuple[list[int], list[float]]:
        result = server.client().chat.completions.create(
            model=name,
            messages=messages_of(case),
            max_tokens=case.max_tokens,
            logprobs=True,
            extra_body={**case.budget, "return_tokens_as_token_ids": True, "skip_special_tokens": False},
        )
        tokens = result.choices[0].logprobs.content
        return [int(token.token.removeprefix("token_id:")) for token in tokens], [token.logprob for token in tokens]

    with ThreadPoolExecutor(len(CASES)) as pool:
        replies = list(pool.map(reply, CASES))
    for case, (ids, logprobs) in zip(CASES, replies, strict=True):
        expected = reference.answer(case)
        assert ids == expected.ids, case
        assert max(abs(a - b) for a, b in zip(logprobs, expected.logprobs, strict=True)) < TOLERANCE, case


@pytest.fixture(scope="module")
def image_host() -> Iterator[ImageHost]:
    with ImageHost() as host:
        yield host


@pytest.fixture(scope="module")
def server(image_host: ImageHost) -> Iterator[Server]:
    with run_server(
        *ENGINE, "--allow-private-image-host", f"127.0.0.1:{image_host.port}", "--max-prompt-tokens", "600", **SETTINGS
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def test_answers_are_those_of_the_transformers_model(client):
    chat_model = ChatModel.load(device="cpu")
    conversation = [user(QUESTION, red_circle()), {"role": "assistant", "content": "red"}, user("what shape is it?")]
    for query_len in (4, 16):
        reply = ask(client, conversation[0], extra_body={"query_len": query_len})
        expected = chat_model.answer([question_message(QUESTION, Image.open(IMAGE_FILE))], MAX_NEW_TOKENS, query_len)
        assert reply.choices[0].message.content == expected
    whole = ask(client, *conversation).choices[0].message.content
    assert whole == stream_text(ask(client, *conversation, stream=True))
    sky = "what color is the sky?"
    expected = chat_model.answer([question_message(sky, None)], MAX_NEW_TOKENS)
    assert ask(client, user(sky)).choices[0].message.content == expected


ACCEPTED = [recording for recording in read_recordings() if recording.refused is None]


@pytest.mark.parametrize("recording", ACCEPTED, ids=str)
def test_requests_of_clients_are_answered(server, recording):
    assert answer_to(server, recording)


def test_what_asks_for_nothing_changes_nothing(client):
    plain = ask(client, user(QUESTION, red_circle())).choices[0].message.content
    values = {**REQUEST.neutral, **dict.fromkeys(REQUEST.ignored, ("x", {"a": ["b"]}))}
    for name, value in ((name, value) for name, allowed in values.items() for value in allowed):
        reply = ask(client, user(QUESTION, red_circle()), extra_body={name: value})
        assert reply.choices[0].message.content == plain, (name, value)


def test_joined_messages_are_answered_as_one(client):
    joined = ask(client, user(f"a shape\n\n{QUESTION}", red_circle()))
    reply = ask(client, user("a shape"), user(QUESTION, red_circle()))
    assert (reply.choices[0].message.content, reply.usage) == (joined.choices[0].message.content, joined.usage)


def test_an_answer_is_continued(client):
    messages = (user(QUESTION, red_circle()), {"role": "assistant", "content": "red"})
    reply = ask(client, *messages, extra_body={"continue_final_message": True, "add_generation_prompt": False})
    assert reply.choices[0].finish_reason == "stop"


def test_an_image_of_an_allowed_host(client, image_host):
    assert ask(client, user(QUESTION, f"{image_host.url}/picture")).choices[0].message.content == "red"


def test_models_and_health(server, client):
    assert [model.id for model in client.models.list().data] == [MODEL]
    assert re.match(rb"HTTP/1.1 200", server.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"))
    assert re.match(rb"HTTP/1.1 404", server.send(b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"))


def hostile(image_host: ImageHost) -> dict[str, dict[str, Any]]:
    """Requests by what is said of them."""
    elsewhere = f"http://127.0.0.1:{image_host.port + 1}/picture"
    return {
        "not on the list": {"messages": [user(QUESTION, elsewhere)]},
        "must be a data URI": {"messages": [user(QUESTION, Path("/etc/hostname").as_uri())]},
        "400000000 pixels": {"messages": [user(QUESTION, data_uri(png_claiming(20_000)))]},
        "truncated": {"messages": [user(QUESTION, data_uri(IMAGE_FILE.read_bytes()[:300]))]},
        "it is none of": {"messages": [user(QUESTION, data_uri(b"no picture"))]},
        "`tokenizer.model_max_length`), got": {"messages": [user("word " * 5_000)]},
        "`query_len` must be one of 4, 16, got 9": {"messages": [user(QUESTION, red_circle())], "query_len": 9},
        "image_token_grid": {"messages": [user(QUESTION, red_circle())], "image_token_grid": 99},
        "`mm_processor_kwargs` must be among": {"messages": [user(QUESTION)], "mm_processor_kwargs": {"size": 1}},
        "media_io_kwargs": {"messages": [user(QUESTION)], "media_io_kwargs": {"image": {}}},
        "video_url": {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]},
    }


def post_head(length: int) -> bytes:
    lines = (
        "POST /v1/chat/completions HTTP/1.1",
        "Host: a",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    )
    return "\r\n".join((*lines, "", "")).encode()


def test_hostile_requests_are_refused_and_the_server_lives(server, client, image_host):
    for reason, content in hostile(image_host).items():
        with pytest.raises(openai.BadRequestError, match=re.escape(reason)):
            client.chat.completions.create(model=MODEL, messages=content.pop("messages"), extra_body=content)
    # ids of a prompt that was never whole: they would stop the engine, which thinks that they came in pieces
    config = FusionConfig.from_pretrained(nano_path())
    image, latent = config.image_token_id, config.latent_token_id
    for ids in ([latent] * 4, [image] * 4, [image] * 16 + [latent] * 4, [latent] * 3):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=MODEL, prompt=ids, max_tokens=1)
    length = 50 * 2**20
    assert re.match(rb"HTTP/1.1 413", server.send(post_head(length)))
    body = b'{"model": "fusion-nano", "messages": "\xff"}'
    assert re.match(rb"HTTP/1.1 400", server.send(post_head(len(body)) + body))
    assert ask(client, user(QUESTION, red_circle())).choices[0].message.content == "red"


def test_limits_below_what_a_server_usually_has(tmp_path):
    """Of tokens in a request; vLLM would have more of them in a step than requests at a time."""
    limits = ("--max-prompt-tokens", "90", "--max-new-tokens", "4", "--concurrency", "200")
    with run_server(*ENGINE, *limits, **SETTINGS) as server:
        assert ask(server.client(), user(QUESTION, red_circle()), max_tokens=4).choices[0].message.content == "red"


def test_key_queue_and_settings_of_the_operator(tmp_path):
    options = ("--api-key-env", "FUSION_KEY", "--concurrency", "1", "--queue-length", "1", "--query-len", "4")
    with run_server(*ENGINE, *options, FUSION_KEY=KEY, **SETTINGS) as server:
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()
        client = server.client(KEY)
        assert client.models.list().data
        few = ask(client, user(QUESTION, red_circle())).usage.prompt_tokens
        many = ask(client, user(QUESTION, red_circle()), extra_body={"query_len": 16}).usage.prompt_tokens
        assert many - few == 12

        def one(_: int) -> int:
            try:
                ask(client, user(QUESTION, red_circle()), max_tokens=200, extra_body={"ignore_eos": True})
            except openai.RateLimitError as error:
                assert "try again soon" in str(error).lower()
                return 429
            return 200

        with ThreadPoolExecutor(6) as pool:
            codes = list(pool.map(one, range(6)))
        assert 429 in codes
        assert 200 in codes


@pytest.mark.parametrize(
    "flag", ["--enable-chunked-prefill", "--enable-prefix-caching", "--max-num-batched-tokens=64"]
)
def test_unsafe_settings_end_the_start_with_a_reason(tmp_path, flag):
    errors = tmp_path / "errors"
    with (
        pytest.raises(AssertionError),
        start_server(*ENGINE, "--", flag, errors=errors, **SETTINGS),
    ):
        pass
    (last,) = errors.read_text(encoding="utf-8").splitlines()[-1:]
    name = flag.split("=")[0].removeprefix("--").replace("-", "_")
    assert last.startswith("error: ")
    assert name in last
