"""Answers over HTTP, read by OpenAI's client, are those of the package itself."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from tests.helpers.serving import (
    IMAGE_FILE,
    MODEL,
    QUESTION,
    ImageHost,
    Server,
    ask,
    red_circle,
    run_server,
    stream_text,
    user,
)

from fusion_hf.inference import ChatModel, question_message
from fusion_hf.inference.model_info import ModelInfo
from fusion_hf.model.configuration_fusion import TokenBudget

MORE = "what shape is in the image?"
SYSTEM = {"role": "system", "content": "You answer in one word."}
MAX_TOKENS = 12
DRAWN = {"temperature": 2.0, "max_tokens": 40}


def own_answer(chat_model: ChatModel, *turns: str, **settings: int) -> str:
    """The package's answer to a question about the red circle after questions and answers."""
    question, *rest = turns
    messages = [question_message(question, chat_model.open_image(str(IMAGE_FILE)))]
    for index, text in enumerate(rest):
        messages.append({"role": "user" if index % 2 else "assistant", "content": text})
    return chat_model.answer(messages, MAX_TOKENS, **settings)


@pytest.mark.parametrize("query_len", [None, 1, 4, 64])
def test_equals_own_answer(client: openai.OpenAI, chat_model: ChatModel, query_len: int | None):
    extra = {} if query_len is None else {"query_len": query_len}
    reply = ask(client, user(QUESTION, red_circle()), max_tokens=MAX_TOKENS, extra_body=extra)
    assert reply.choices[0].message.content == own_answer(chat_model, QUESTION, **extra)
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.object, reply.model, reply.choices[0].message.role) == ("chat.completion", MODEL, "assistant")


def test_query_len_counts(client: openai.OpenAI, chat_model: ChatModel):
    tokens = [
        ask(client, user(QUESTION, red_circle()), extra_body={"query_len": length}).usage.prompt_tokens
        for length in (1, 4, 16)
    ]
    assert [count - tokens[0] for count in tokens] == [0, 3, 15]
    grids = [
        ask(client, user(QUESTION, red_circle()), extra_body={"image_token_grid": side}).usage.prompt_tokens
        for side in (2, 6)
    ]
    assert grids[1] - grids[0] == 36 - 4


def test_usage(client: openai.OpenAI, chat_model: ChatModel):
    inputs = chat_model.prepare([question_message(QUESTION, chat_model.open_image(str(IMAGE_FILE)))])
    output = chat_model.generate(inputs, MAX_TOKENS)
    usage = ask(client, user(QUESTION, red_circle()), max_tokens=MAX_TOKENS).usage
    prompt = inputs["input_ids"].shape[1]
    assert usage.prompt_tokens == prompt
    assert usage.completion_tokens == output.sequences.shape[1] - prompt
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_several_turns(client: openai.OpenAI, chat_model: ChatModel):
    first = ask(client, user(QUESTION, red_circle()))
    answer = first.choices[0].message
    # as its users do: the client's own object goes back
    second = ask(client, user(QUESTION, red_circle()), answer, user(MORE), max_tokens=MAX_TOKENS)
    assert second.choices[0].message.content == own_answer(chat_model, QUESTION, answer.content, MORE)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


@pytest.mark.parametrize("temperature", [1e-38, 5e-324, 1e-3])
def test_temperatures_near_zero(client: openai.OpenAI, chat_model: ChatModel, temperature: float):
    reply = ask(client, user(QUESTION, red_circle()), temperature=temperature, top_p=1e-300, max_tokens=MAX_TOKENS)
    assert reply.choices[0].message.content == own_answer(chat_model, QUESTION)


def test_text_only(client: openai.OpenAI, chat_model: ChatModel):
    messages = [SYSTEM, {"role": "user", "content": "what color is the sky?"}]
    reply = ask(client, *messages, max_tokens=MAX_TOKENS)
    assert reply.choices[0].message.content == chat_model.answer(messages, MAX_TOKENS)
    developer = ask(client, {**SYSTEM, "role": "developer"}, messages[1], max_tokens=MAX_TOKENS)
    assert developer.usage.prompt_tokens == reply.usage.prompt_tokens


def test_image_at_an_address(client: openai.OpenAI, chat_model: ChatModel, image_host: ImageHost):
    expected = own_answer(chat_model, QUESTION)
    for path in ("/red.png?size=1", "/redirect//red.png", f"/redirect/{image_host.url}/red.png"):
        reply = ask(client, user(QUESTION, image_host.url + path), max_tokens=MAX_TOKENS)
        assert reply.choices[0].message.content == expected
    assert "/red.png?size=1" in image_host.requested


STREAMED = [{}, {"max_tokens": 1}, {**DRAWN, "seed": 1}, {**DRAWN, "seed": 2, "stop": ["e", "s"]}]


@pytest.mark.parametrize("settings", STREAMED, ids=["likely", "short", "drawn", "stopped"])
@pytest.mark.parametrize("model", ["client", "talkative"])
def test_stream_equals_whole(model: str, settings: dict, request: pytest.FixtureRequest):
    client = request.getfixturevalue(model)
    settings = {"max_tokens": MAX_TOKENS, **settings}
    whole = ask(client, user(QUESTION, red_circle()), **settings)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(client, user(QUESTION, red_circle()), **settings, **options))
    assert stream_text(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [
        *[None] * (len(chunks) - 2),
        whole.choices[0].finish_reason,
    ]
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_without_usage(client: openai.OpenAI):
    chunks = list(ask(client, user(QUESTION, red_circle()), stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_many_pieces(talkative: openai.OpenAI):
    chunks = list(ask(talkative, user("tell me"), **DRAWN, seed=1, stream=True))
    assert len(chunks) > DRAWN["max_tokens"] / 2


def test_seed(talkative: openai.OpenAI):
    def texts(**settings: object) -> list[str]:
        return [ask(talkative, user("tell me"), **settings).choices[0].message.content for _ in range(3)]

    seeded = texts(**DRAWN, seed=3)
    assert len(set(seeded)) == 1
    assert texts(**DRAWN, seed=4)[0] != seeded[0]
    assert len(set(texts(**DRAWN))) == 3
    likely = texts(max_tokens=DRAWN["max_tokens"])
    assert len(set(likely)) == 1
    # next to nothing of the distribution is its most likely token
    assert texts(**DRAWN, top_p=1e-6) == likely


def test_length(client: openai.OpenAI):
    for name in ("max_tokens", "max_completion_tokens"):
        reply = ask(client, user(QUESTION, red_circle()), **{name: 1})
        assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("red", "length")
        assert reply.usage.completion_tokens == 1


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_strings(talkative: openai.OpenAI, as_list: bool):
    settings = {**DRAWN, "seed": 3}
    whole = ask(talkative, user("tell me"), **settings)
    text = whole.choices[0].message.content
    middle = text[len(text) // 2 :][:3]  # a stop over the ends of tokens
    stop = ["\x00 never", middle] if as_list else middle
    reply = ask(talkative, user("tell me"), **settings, stop=stop)
    assert reply.choices[0].message.content == text[: text.index(middle)].strip()
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < whole.usage.completion_tokens


def test_models(client: openai.OpenAI, chat_model: ChatModel):
    assert [model.id for model in client.models.list()] == [MODEL]
    model = client.models.retrieve(MODEL)
    assert model.id == MODEL
    assert model.model_extra["max_model_len"] == chat_model.max_length
    budget = TokenBudget(chat_model.processor.query_len, chat_model.model.config.grid_side())
    info = ModelInfo.of(chat_model, budget)
    assert ModelInfo.read(model.model_extra["fusion"]) == info
    reply = ask(client, user(QUESTION), max_tokens=1)
    assert reply.system_fingerprint == model.model_extra["system_fingerprint"] == info.fingerprint
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_health(server: Server):
    server.wait_for(running=0, waiting=0)
    assert server.health() == {"status": "ok", "running": 0, "waiting": 0}


@pytest.mark.slow
def test_key_and_name(tmp_path: Path):
    with run_server("--api-key-env", "FUSION_KEY", "--name", "my/model", FUSION_KEY="s3cret") as server:
        assert server.client("s3cret").models.retrieve("my/model").id == "my/model"
        for key in ("wrong", "s3cret2", "s3cre", "S3CRET"):
            with pytest.raises(openai.AuthenticationError) as refused:
                server.client(key).models.list()
            assert refused.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):
                ask(server.client(key), user(QUESTION))
        assert b"401" in server.send(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n").splitlines()[0]
        assert b"401" in server.send(b"GET /other HTTP/1.1\r\nHost: x\r\n\r\n").splitlines()[0]
        assert b"200" in server.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").splitlines()[0]


def test_concurrent_requests(talkative: openai.OpenAI):
    """Different settings at the same time, drawn tokens and stop strings among them, each as alone."""
    requests = [
        (user(QUESTION, red_circle()), {"max_tokens": 30}),
        (user(QUESTION, red_circle()), {"max_tokens": 30, "extra_body": {"query_len": 4}}),
        (user("what color is the sky?"), {"max_tokens": 50}),
        *((user("tell me"), {**DRAWN, "seed": seed}) for seed in range(3)),
        (user("tell me"), {**DRAWN, "seed": 3, "stop": "e"}),
    ]
    alone = [ask(talkative, message, **settings) for message, settings in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: ask(talkative, request[0], **request[1]), requests))
    for one, other in zip(alone, together, strict=True):
        assert (one.choices, one.usage) == (other.choices, other.usage)
