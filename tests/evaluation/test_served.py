"""A server in the model's place: what it is sent, what is tried again, and what never passes for an answer."""

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.helpers.http_server import HttpServer, Response
from tests.helpers.openai_server import TOKENS, Scripted, prompt_of, serve

from fusion_hf.common.endpoint_client import EndpointClient
from fusion_hf.common.endpoints import CHAT, MODELS, EndpointUnavailable, endpoint_url
from fusion_hf.common.errors import InputError
from fusion_hf.data.easy_vqa import read_easy_vqa
from fusion_hf.evaluation.answering import RequestAnswerer
from fusion_hf.evaluation.prompting import Continuation, Generation, Messages, Request
from fusion_hf.evaluation.served import TRIES, ServedModel, image_uri, open_unturned
from fusion_hf.inference import ChatModel
from fusion_hf.inference.model_info import FINGERPRINT, INFO, MAX_LENGTH, ModelInfo
from fusion_hf.model.image_opening_fusion import ORIENTATION_TAG
from fusion_hf.serving.client_images import decode_client_image, decode_data_uri
from fusion_hf.serving.limits import Limits

NAME = "a-model"
KEY, VARIABLE = "sk-very-secret", "TEST_EVALUATION_KEY"
INFO_OF_NAME = ModelInfo("a-model@1", "bfloat16", "cuda:0", 36, 27, 4096, "FUSION 3B")
ENTRY = {"id": NAME, MAX_LENGTH: 4096, INFO: INFO_OF_NAME.write()}
DEAD = "http://127.0.0.1:9/v1"  # a port of this machine that nobody listens at
RIGHT_TURN = 6  # of EXIF: the camera was held upright
BROWN = (150, 90, 30)


def echo(payload: dict[str, Any]) -> str:
    return f"you said {prompt_of(payload)}"


@pytest.fixture
def script() -> Iterator[Scripted]:
    with serve(Scripted(echo, models=[ENTRY])) as script:
        yield script


def connect(script: Scripted, **settings: Any) -> ServedModel:
    model = ServedModel.connect(script.url, **settings)
    model.client.first_pause = 0.01
    return model


def ask(text: str, number: int = 0, wanted: Any = None, role: str = "user") -> Request:
    messages: Messages = [{"role": role, "content": text}]
    return Request("a_task", number, lambda: messages, Generation(6) if wanted is None else wanted)


def decode(uri: str, chat_model: ChatModel) -> Image.Image:
    """The image as the server reads it."""
    limits = Limits()
    return decode_client_image(decode_data_uri(uri, limits), chat_model.processor.image_processor, limits.image_pixels)


def texts(answers: list[Any]) -> list[str | None]:
    return [None if answer is None else answer["answer"] for answer in answers]


# Images


def noise(mode: str, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(values.integers(0, 2**16, (9, 14), dtype=np.uint16))
    color = Image.fromarray(values.integers(0, 256, (9, 14, 4), dtype=np.uint8))
    return color if mode == "RGBA" else color.convert("RGB").convert(mode)


def save(image: Image.Image, path: Path, **settings: Any) -> Path:
    image.save(path, **settings)
    return path


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = RIGHT_TURN
    return exif


FILES = {
    "rgb.png": (noise("RGB"), {}),
    "gray.png": (noise("L"), {}),
    "palette.gif": (noise("P"), {}),
    "alpha.png": (noise("RGBA"), {}),
    "gray16.png": (noise("I;16"), {}),
    "gray16.tiff": (noise("I;16"), {"tiffinfo": {ORIENTATION_TAG: RIGHT_TURN}}),
    "bits.png": (noise("1"), {}),
    "photo.jpg": (noise("RGB"), {"quality": 30}),
    "print.jpg": (noise("CMYK"), {}),
    "turned.jpg": (noise("RGB"), {"exif": turned()}),
    "turned.png": (noise("RGB"), {"exif": turned()}),
    "profile.png": (noise("RGB"), {"icc_profile": b"no profile at all"}),
}


@pytest.mark.parametrize("exif_transpose", [True, False])
@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_server_sees_the_same_pixels(
    chat_model: ChatModel, tmp_path: Path, monkeypatch, name: str, as_file: bool, exif_transpose: bool
):
    image, settings = FILES[name]
    path = save(image, tmp_path / name, **settings)
    monkeypatch.setattr(chat_model.processor.image_processor, "exif_transpose", exif_transpose)
    here = chat_model.open_image(str(path) if as_file else Image.open(path))
    uri = image_uri(open_unturned(str(path) if as_file else Image.open(path)))
    there = decode(uri, chat_model)
    assert here.tobytes() == there.tobytes() and here.size == there.size


def test_a_file_is_sent_as_it_is(tmp_path: Path):
    path = save(noise("RGB"), tmp_path / "photo.jpg")
    uri = image_uri(open_unturned(str(path)))
    assert uri.startswith("data:image/jpeg;")
    assert decode_data_uri(uri, Limits()) == path.read_bytes()


def test_an_image_that_was_changed_since_it_was_opened(chat_model: ChatModel, tmp_path: Path):
    with Image.open(save(noise("RGB"), tmp_path / "a.png")) as image:
        image.putpixel((0, 0), BROWN)
        uri = image_uri(open_unturned(image))
    assert decode(uri, chat_model).getpixel((0, 0)) == BROWN


def test_a_turned_image_is_another_question(script: Scripted):
    stream = io.BytesIO()
    noise("RGB").save(stream, "PNG", exif=turned())

    def show(image: Image.Image) -> Request:
        content = [{"type": "image", "url": image}, {"type": "text", "text": "what?"}]
        return Request("a_task", 0, lambda: [{"role": "user", "content": content}], Generation(6))

    answerer = RequestAnswerer(connect(script))
    answerer.answer([show(noise("RGB")), show(Image.open(stream)), show(noise("RGB")), show(noise("RGB", seed=1))])
    assert (answerer.asked, answerer.failures) == (3, [])


# What is sent


def test_what_a_question_looks_like(script: Scripted):
    path = read_easy_vqa("test")[0].path
    content = [
        {"type": "text", "text": "look:"},
        {"type": "image", "url": str(path)},
        {"type": "text", "text": "what?"},
    ]
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and that?"},
    ]
    wanted = Generation(20, until=("\n", ""))
    model = connect(script, query_len=4, image_token_grid=3)
    answers = RequestAnswerer(model).answer([Request("a_task", 0, lambda: messages, wanted)])
    assert texts(answers) == ["you said and that?"]
    (payload,) = script.requests
    sent = payload.pop("messages")
    assert payload == {
        "model": NAME, "max_tokens": 20, "temperature": 0.0, "stop": ["\n"], "query_len": 4, "image_token_grid": 3,
    }  # fmt: skip
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
    first, shown, last = sent[1]["content"]
    assert (first["text"], last["text"]) == ("look:", "what?")
    assert decode_data_uri(shown["image_url"]["url"], Limits()) == path.read_bytes()


def test_a_server_may_choose_the_tokens_and_need_not_know_where_to_stop(script: Scripted):
    answers = RequestAnswerer(connect(script)).answer([ask("a Q: b", wanted=Generation(6, until=("Q:",)))])
    assert texts(answers) == ["you said a"]
    assert not {"query_len", "image_token_grid"} & script.requests[0].keys()


def test_sampled_answers_have_a_seed_of_their_question(script: Scripted):
    sampled = Generation(6, temperature=0.5, top_p=0.9)
    for _ in range(2):
        RequestAnswerer(connect(script)).answer([ask("a", wanted=sampled), ask("a", wanted=sampled)])
    seeds = [payload["seed"] for payload in script.requests]
    assert sorted(seeds[:2]) == sorted(seeds[2:]) and len(set(seeds)) == 2
    assert {(payload["temperature"], payload["top_p"]) for payload in script.requests} == {(0.5, 0.9)}


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (Continuation("red"), "Tasks that score options by log-likelihood"),
        (Generation(6, num_beams=3), "`num_beams` must be 1 with --url, got 3."),
        (Generation(6, until=tuple("abcde")), "`until` must have at most 4 texts with --url, got 5."),
    ],
)
def test_what_no_server_is_asked(script: Scripted, wanted: Any, reason: str):
    answerer = RequestAnswerer(connect(script))
    assert answerer.answer([ask("a", wanted=wanted)]) == [None]
    assert reason in answerer.failures[0].reason
    assert script.requests == []


@pytest.mark.parametrize("parallel", [1, 3])
def test_so_many_requests_are_in_flight(parallel: int):
    running, most, guard = 0, 0, threading.Lock()
    together = threading.Barrier(parallel)

    def write(payload: dict[str, Any]) -> str:
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
        together.wait(5)  # all of them are here at once
        with guard:
            running -= 1
        return echo(payload)

    with serve(Scripted(write, models=[ENTRY])) as script:
        answers = RequestAnswerer(connect(script, parallel=parallel)).answer(
            [ask(str(n), n) for n in range(4 * parallel)]
        )
    assert texts(answers) == [f"you said {n}" for n in range(4 * parallel)]
    assert most == parallel


# What fails


@pytest.mark.parametrize("fault", ["429!", "500", "503", "drop", "half"])
def test_what_passes_is_tried_again(script: Scripted, fault: str):
    script.faults = lambda payload, repeat: fault if repeat < 2 else None
    answerer = RequestAnswerer(connect(script))
    assert texts(answerer.answer([ask("a"), ask("b", 1)])) == ["you said a", "you said b"]
    assert (len(script.requests), answerer.failures) == (6, [])


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        ("400", 'HTTP 400: {"error": {"message": "as the script says"}}', 1),
        ("413", "HTTP 413", 1),
        ("302", "HTTP 302", 1),
        ("huge", "more than", 1),
        ("cut", f"the server ended the answer after {TOKENS} of 20 tokens", 1),
    ],
)
def test_one_question_that_is_refused_keeps_no_answer_from_the_others(script, fault, reason, requests):
    script.faults = lambda payload, repeat: fault if prompt_of(payload) == "b" else None
    answerer = RequestAnswerer(connect(script))
    answers = answerer.answer([ask(text, number, Generation(20)) for number, text in enumerate("abc")])
    assert texts(answers) == ["you said a", None, "you said c"]
    (failure,) = answerer.failures
    assert (failure.doc_id, reason in failure.reason) == (1, True), failure
    assert len(script.requests) == 2 + requests


def test_a_server_that_fails_on_one_question_alone(script: Scripted):
    """It answers others meanwhile, so it is not dead."""
    first_failure = threading.Event()

    def write(payload: dict[str, Any]) -> str:
        first_failure.wait(5)
        return echo(payload)

    def fail(payload: dict[str, Any], repeat: int) -> str | None:
        if prompt_of(payload) != "b":
            return None
        if repeat:
            first_failure.set()
        return "500"

    script.writer, script.faults = write, fail
    answerer = RequestAnswerer(connect(script, parallel=3))
    assert texts(answerer.answer([ask(text, n) for n, text in enumerate("abc")])) == ["you said a", None, "you said c"]
    assert "HTTP 500 in 8 tries" in answerer.failures[0].reason
    assert "No further question" not in answerer.failures[0].reason


@pytest.mark.parametrize("text", [None, 7])
def test_no_content_is_no_answer(text: Any):
    with serve(Scripted(lambda payload: text, models=[ENTRY])) as script:
        answerer = RequestAnswerer(connect(script))
        assert answerer.answer([ask("a")]) == [None]
    assert "the reply has no content" in answerer.failures[0].reason


def test_an_empty_answer_is_one(script: Scripted):
    script.writer = lambda payload: ""
    assert texts(RequestAnswerer(connect(script)).answer([ask("a")])) == [""]


def test_an_answer_may_end_at_the_models_maximum():
    entry = {"id": NAME, MAX_LENGTH: TOKENS + 1}  # the prompt has one word
    with serve(Scripted(echo, faults=lambda payload, repeat: "cut", models=[entry])) as script:
        assert texts(RequestAnswerer(connect(script)).answer([ask("a", wanted=Generation(20))])) == ["you said a"]


def test_a_server_that_dies_fails_once_and_the_rest_is_not_asked(script: Scripted):
    script.faults = lambda payload, repeat: "drop" if int(prompt_of(payload)) >= 5 else None
    answerer = RequestAnswerer(connect(script, parallel=1))
    answers = answerer.answer([ask(str(number), number) for number in range(300)])
    assert texts(answers) == [f"you said {number}" for number in range(5)] + [None] * 295
    (failure,) = answerer.failures
    assert "/v1/chat/completions does not answer: connection failed (" in failure.reason
    assert failure.reason.endswith("in 8 tries. No further question was asked")
    assert max(int(prompt_of(payload)) for payload in script.requests) < 10
    script.faults = lambda payload, repeat: None
    assert texts(answerer.answer([ask(str(number), number) for number in range(300)])) == [
        f"you said {number}" for number in range(300)
    ]


def test_a_server_with_another_model_since_the_run_began(script: Scripted):
    script.models = [{**ENTRY, FINGERPRINT: "a-model@1"}]
    answerer = RequestAnswerer(connect(script))
    script.fingerprint = "a-model@1"
    assert texts(answerer.answer([ask("a")])) == ["you said a"]
    script.fingerprint = "a-model@2"
    assert texts(answerer.answer([ask("a"), ask("b", 1)])) == ["you said a", None]
    assert "has changed its model from 'a-model@1' to 'a-model@2' since the run started" in answerer.failures[0].reason


def test_a_server_that_does_not_answer(script: Scripted):
    script.faults, script.slow_seconds = lambda payload, repeat: "slow", 5.0
    model = connect(script)
    model.client.timeout = 0.2
    answerer = RequestAnswerer(model)
    assert answerer.answer([ask("a")]) == [None]
    assert "does not answer: no response in 0.2 s. No further" in answerer.failures[0].reason
    assert len(script.requests) == 1


# Who is asked


def test_the_only_model_is_asked(script: Scripted):
    model = connect(script)
    record = model.describe()
    assert (record.name, record.url, record.revision, record.dtype) == (NAME, script.url, "a-model@1", "bfloat16")
    assert (record.device, record.query_len, record.image_token_grid) == ("cuda:0", 36, 27)
    assert record.published == "FUSION 3B"
    assert connect(script, query_len=4).describe().query_len == 4
    script.models = [{**ENTRY, INFO: {**INFO_OF_NAME.write(), "published": "FUSION 99B"}}]
    assert connect(script).describe().published is None


@pytest.mark.parametrize(
    "facts",
    [None, 1, {}, {**INFO_OF_NAME.write(), "query_len": "36"}, {**INFO_OF_NAME.write(), "published": 3}],
)
def test_a_server_that_says_nothing_of_its_model(facts: Any):
    with serve(Scripted(echo, models=[{"id": NAME, INFO: facts}])) as script:
        record = connect(script).describe()
    assert (record.revision, record.dtype, record.device) == (f"{NAME} at {script.url}", "unknown", "unknown")
    assert (record.query_len, record.image_token_grid, record.published) == (None, None, None)


def key_of(script: Scripted, **settings: Any) -> str:
    return connect(script, **settings).reader.prompt(ask("a")).key


def test_answers_are_those_of_a_model_wherever_it_is():
    """A server that says what it has may move; another model under its name is another one."""
    other = {**ENTRY, INFO: {**INFO_OF_NAME.write(), "revision": "a-model@2"}}
    moved = {**ENTRY, INFO: {**INFO_OF_NAME.write(), "device": "cpu", "more": 1}}
    silent = {"id": NAME}
    keys = []
    for entry in (ENTRY, moved, other, silent, silent):
        with serve(Scripted(echo, models=[entry])) as script:
            keys.append(key_of(script))
            assert key_of(script, query_len=4) not in keys
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_one_of_several_models(script: Scripted):
    script.models.append({"id": "another"})
    assert connect(script, name="another").name == "another"
    with pytest.raises(InputError, match=r"--model must be one of 'a-model', 'another' at http://\S+, got no name\."):
        connect(script)
    with pytest.raises(InputError, match=r"--model must be one of 'a-model', 'another' at http://\S+, got 'a'\."):
        connect(script, name="a")


def test_nobody_is_there():
    with pytest.raises(InputError, match=f"--url {DEAD} cannot be asked: .* connection failed .* in 3 tries"):
        ServedModel.connect(DEAD)


def test_a_server_of_another_protocol():
    message = "models does not answer: the response is not JSON"
    with HttpServer(lambda _: Response(b"<html>hello</html>")) as shop, pytest.raises(InputError, match=message):
        ServedModel.connect(f"{shop.url}/v1")


def test_pauses_are_those_that_a_server_asks_for_but_not_any(monkeypatch):
    monkeypatch.setattr("fusion_hf.common.endpoint_client.LONGEST_PAUSE", 0.3)
    tomorrow = {"Retry-After": str(24 * 60 * 60)}
    with HttpServer(lambda request: Response(status=429, headers=tomorrow)) as busy:
        client, begin = EndpointClient(None, 5.0, TRIES, first_pause=0.001), time.monotonic()
        with pytest.raises(EndpointUnavailable, match="HTTP 429 in 4 tries"):
            client.ask(endpoint_url(busy.url, MODELS), tries=4)
    assert 0.9 <= time.monotonic() - begin < 5


def test_pauses_grow(script: Scripted):
    script.faults = lambda payload, repeat: "429!" if repeat < 3 else None  # which asks for none
    client, begin = EndpointClient(None, 5.0, TRIES, first_pause=0.2), time.monotonic()
    client.ask(endpoint_url(script.url, CHAT), {"messages": [{"content": "a"}]})
    assert time.monotonic() - begin >= 0.5 * (0.2 + 0.4 + 0.8)


def test_nobody_is_sent_elsewhere(script: Scripted):
    """The key would go along."""
    elsewhere = Response(status=307, headers={"Location": f"{script.url}/v1/models"})
    with HttpServer(lambda _: elsewhere) as mover, pytest.raises(InputError, match="HTTP 307"):
        ServedModel.connect(f"{mover.url}/v1")


def test_a_server_that_knows_no_models():
    with HttpServer(lambda request: Response(status=501)) as server, pytest.raises(InputError, match="HTTP 501"):
        ServedModel.connect(f"{server.url}/v1")


@pytest.mark.parametrize("models", [[], [{}], [{"id": 3}], ["a"]])
def test_a_server_without_models(script: Scripted, models: list[Any]):
    script.models = models
    with pytest.raises(InputError, match=r"--model must be one of none at|--url must be an OpenAI-compatible server"):
        connect(script)


def test_the_key_goes_to_the_server_and_nowhere_else(script: Scripted, monkeypatch):
    script.key = KEY
    monkeypatch.setenv(VARIABLE, f" {KEY}\n")
    model = connect(script, key_variable=VARIABLE)
    assert texts(RequestAnswerer(model).answer([ask("a")])) == ["you said a"]
    monkeypatch.setenv(VARIABLE, "sk-wrong-but-secret")
    answerer = RequestAnswerer(model)
    answerer.answer([ask("a")])
    with pytest.raises(InputError, match="HTTP 401 Unauthorized") as refused:
        connect(script, key_variable=VARIABLE)
    with pytest.raises(InputError, match="HTTP 401 Unauthorized"):
        connect(script)
    assert "HTTP 401 Unauthorized" in answerer.failures[0].reason
    assert "sk-" not in f"{refused.value} {answerer.failures} {vars(model.client)} {model.describe()}"


@pytest.mark.parametrize(("value", "message"), [(None, rf"{VARIABLE} \(--api-key-env\) is not set"), ("ü", "ASCII")])
def test_keys_that_are_none(monkeypatch, value: str | None, message: str):
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(InputError, match=message):
        ServedModel.connect(DEAD, key_variable=VARIABLE)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", r"--url must be an http\(s\) URL such as http://HOST:PORT/v1, got .127.0.0.1:8000."),
        ("file:///etc/passwd", r"must be an http\(s\) URL.*got"),
        ("http://", r"must be an http\(s\) URL.*got"),
        ("http://[::1/v1", "got an invalid URL"),
        ("http://host:99999/v1", "got an invalid URL"),
        ("http://a b/v1", r"must be an http\(s\) URL.*got"),
        ("http://me:secret@host/v1", "Pass a key by --api-key-env"),
        ("http://host/v1?key=secret", "Pass a key by --api-key-env"),
    ],
)
def test_addresses_that_are_none(url: str, message: str):
    with pytest.raises(InputError, match=message) as refused:
        ServedModel.connect(url)
    assert "secret" not in str(refused.value)
