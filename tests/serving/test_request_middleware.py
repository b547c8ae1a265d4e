"""What stands before vLLM's server, around a small application; needs no vLLM."""

import asyncio
import base64
import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from tests.helpers.client_requests import read_recordings
from tests.helpers.costly_images import flat, one_bit_png
from tests.helpers.image_files import jpeg_of_many_scans, png_claiming
from tests.helpers.serving import IMAGE_FILE, QUESTION, ImageHost, data_uri, red_circle, user

from fusion_hf.serving.api_errors import CHAT
from fusion_hf.serving.limits import Limits
from fusion_hf.vllm.request_middleware import COMPLETIONS, VARIABLE, MiddlewareSettings, RequestMiddleware

KEY = "a secret"
JSON_TYPE = (b"content-type", b"application/json")
SYSTEM, ANSWER = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "red"}


class Recorder:
    """An application that keeps what comes through, and answers as soon as it may."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def __call__(self, scope, receive, send) -> None:
        message = await receive() if scope["method"] == "POST" else {"body": b"{}"}
        self.bodies.append(json.loads(message["body"]))
        self.headers.append(dict(scope["headers"]))
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


@pytest.fixture(autouse=True)
def no_settings_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "{}")


@pytest.fixture
def image_host() -> Iterator[ImageHost]:
    with ImageHost() as host:
        yield host


def make_middleware(**settings: Any) -> RequestMiddleware:
    MiddlewareSettings(**settings).to_environment()
    return RequestMiddleware(Recorder())


async def request(
    middleware: RequestMiddleware, content: Any, path: str = CHAT, method: str = "POST", headers: Any = (JSON_TYPE,)
):
    """Status and JSON of the reply."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    scope = {"type": "http", "method": method, "path": path, "headers": list(headers), "query_string": b""}
    sent: list[dict[str, Any]] = []

    remaining = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not remaining:
            await asyncio.Event().wait()  # the client waits for its answer
        return remaining.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await middleware(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


def ask(middleware: RequestMiddleware, content: Any, **more: Any) -> tuple[int, dict[str, Any]]:
    async def ask_and_end() -> tuple[int, dict[str, Any]]:
        try:
            return await request(middleware, content, **more)
        finally:
            await middleware.images.close()

    return asyncio.run(ask_and_end())


def test_the_budget_goes_to_where_vllm_has_it():
    middleware = make_middleware(image_token_grid=3)
    content = {"messages": [user(QUESTION, red_circle())], "query_len": 4, "temperature": 0.5}
    assert ask(middleware, content)[0] == 200
    (body,) = middleware.app.bodies
    assert body == {
        "messages": content["messages"],
        "temperature": 0.5,
        "mm_processor_kwargs": {"query_len": 4, "image_token_grid": 3},
    }
    assert middleware.app.headers[0][b"content-length"] == str(len(json.dumps(body))).encode()
    ask(middleware, {"messages": [user(QUESTION)], "mm_processor_kwargs": {"image_token_grid": 2}})
    assert middleware.app.bodies[1]["mm_processor_kwargs"] == {"image_token_grid": 2}


def test_addresses_become_data_uris_and_only_of_listed_hosts(image_host):
    middleware = make_middleware(private_hosts=[f"127.0.0.1:{image_host.port}"])
    assert ask(middleware, {"messages": [user(QUESTION, f"{image_host.url}/picture")]})[0] == 200
    (part,) = (part for part in middleware.app.bodies[0]["messages"][0]["content"] if part["type"] == "image_url")
    assert part["image_url"]["url"] == data_uri(IMAGE_FILE.read_bytes())
    status, reply = ask(make_middleware(), {"messages": [user(QUESTION, f"{image_host.url}/picture")]})
    assert (status, reply["error"]["code"]) == (400, "image_not_allowed")


def text_of(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def test_neighbours_are_joined_and_the_same_image_counts_once(image_host):
    middleware = make_middleware(private_hosts=[f"127.0.0.1:{image_host.port}"])
    asked = user(QUESTION, f"{image_host.url}/one")
    developer = {"role": "developer", "content": "Be short."}
    assert (
        ask(middleware, {"messages": [SYSTEM, developer, asked, asked, {**ANSWER, "content": None}, asked]})[0] == 200
    )
    messages = middleware.app.bodies[0]["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    texts = ["Be kind.\n\nBe short.", f"{QUESTION}\n\n{QUESTION}", "", QUESTION]
    assert [text_of(message) for message in messages] == texts
    assert json.dumps(messages).count('"image_url": {"url"') == 1
    assert image_host.requested == ["/one"]


def test_an_answer_is_continued_where_the_request_says_so():
    middleware = make_middleware()
    content = {"messages": [user(QUESTION), ANSWER], "continue_final_message": True, "add_generation_prompt": False}
    assert ask(middleware, content)[0] == 200
    assert middleware.app.bodies[0]["messages"][1]["role"] == "assistant"
    assert middleware.app.bodies[0]["continue_final_message"] is True


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_longer_answers_than_the_server_gives_are_left_to_its_default(name):
    middleware = make_middleware(limits=Limits(answer_tokens=64))
    for length in (1, 63, 64, 65, 10**9):
        assert ask(middleware, {"messages": [user(QUESTION)], name: length})[0] == 200
    assert [body.get("max_tokens") for body in middleware.app.bodies] == [1, 63, None, None, None]
    assert all("max_completion_tokens" not in body for body in middleware.app.bodies)


def test_what_asks_for_nothing_does_not_reach_vllm_where_vllm_refuses_it():
    middleware = make_middleware()
    nothing = {
        "tools": [], "tool_choice": "auto", "functions": [], "function_call": "none", "parallel_tool_calls": True,
        "media_io_kwargs": {}, "user": {"name": "ann"}, "n": None, "stop": None, "logit_bias": None,
    }  # fmt: skip
    assert ask(middleware, {"messages": [user(QUESTION)], "top_k": -1, **nothing, "seed": 3})[0] == 200
    assert middleware.app.bodies[0].keys() == {"messages", "top_k", "seed", "mm_processor_kwargs"}


ACCEPTED = [recording for recording in read_recordings() if recording.refused is None]


@pytest.mark.parametrize("recording", ACCEPTED, ids=str)
def test_requests_of_clients_come_through(recording):
    middleware = make_middleware()
    status, reply = ask(middleware, json.loads(recording.content))
    assert status == 200, reply
    (body,) = middleware.app.bodies
    roles = [message["role"] for message in body["messages"]]
    turns = roles[roles[0] == "system" :]
    assert turns == (["user", "assistant"] * len(turns))[: len(turns)]


def test_images_are_counted_before_one_is_fetched(image_host):
    middleware = make_middleware(private_hosts=[f"127.0.0.1:{image_host.port}"])
    status, reply = ask(
        middleware, {"messages": [user(QUESTION, f"{image_host.url}/{name}") for name in ("one", "two")]}
    )
    assert status == 400
    assert "`messages` must have at most 1 image, got 2" in reply["error"]["message"]
    assert image_host.requested == []


def test_a_client_that_leaves_in_the_middle_of_its_request_gets_its_place_back():
    async def leave(middleware: RequestMiddleware) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            raise AssertionError(message)

        await middleware({"type": "http", "method": "POST", "path": CHAT, "headers": [JSON_TYPE]}, receive, send)

    middleware = make_middleware(limits=Limits(parallel=1, queue_length=1))
    for _ in range(4):
        asyncio.run(leave(middleware))
    assert ask(middleware, {"messages": [user(QUESTION)]})[0] == 200


def sent_image(middleware: RequestMiddleware) -> bytes:
    (part,) = (part for part in middleware.app.bodies[0]["messages"][0]["content"] if part["type"] == "image_url")
    return base64.b64decode(part["image_url"]["url"].partition(",")[2])


@pytest.mark.parametrize("kind", ["WEBP", "JPEG2000"])
def test_images_whose_decoders_keep_the_lock_become_png(kind: str):
    """vLLM decodes in its server's process; meanwhile nothing else would be answered."""
    middleware, file = make_middleware(), flat(kind, 100)
    assert ask(middleware, {"messages": [user(QUESTION, data_uri(file, "webp"))]})[0] == 200
    with Image.open(BytesIO(sent_image(middleware))) as sent, Image.open(BytesIO(file)) as original:
        assert sent.format == "PNG"
        assert sent.tobytes() == original.convert("RGB").tobytes()


@pytest.mark.parametrize("name", ["png", "scans"])
def test_images_that_take_long(name: str):
    middleware = make_middleware(limits=Limits(image_pixels=2**28, image_seconds=0.2))
    file = one_bit_png(8000) if name == "png" else jpeg_of_many_scans(2048, size=100_000)
    status, reply = ask(middleware, {"messages": [user(QUESTION, data_uri(file))]})
    assert status == 400
    assert "at most 0.2 s" in reply["error"]["message"] or "scans" in reply["error"]["message"]
    assert middleware.app.bodies == []


def test_a_client_that_leaves_while_its_image_is_decoded():
    async def leave(middleware: RequestMiddleware) -> None:
        content = {"messages": [user(QUESTION, data_uri(one_bit_png(8000)))]}
        messages = [{"type": "http.request", "body": json.dumps(content).encode()}, {"type": "http.disconnect"}]

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0 if len(messages) == 2 else 0.1)
            return messages.pop(0)

        async def send(message: dict[str, Any]) -> None:
            raise AssertionError(message)

        await middleware.images.start()
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [JSON_TYPE]}
        await asyncio.wait_for(middleware(scope, receive, send), 2)
        assert middleware.intake.taken == 0 and middleware.app.bodies == []
        await middleware.images.close()

    asyncio.run(leave(make_middleware(limits=Limits(image_pixels=2**28, image_seconds=60))))


def test_slow_uploads_take_no_places_and_are_bounded_together():
    async def crowd() -> None:
        middleware = make_middleware(limits=Limits(parallel=1, queue_length=0, body_bytes=100, upload_bytes=250))
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [JSON_TYPE]}

        async def slowly(size: int, sent: list[Any]) -> None:
            messages = [{"type": "http.request", "body": b" " * size, "more_body": True}]

            async def receive() -> dict[str, Any]:
                if not messages:
                    await asyncio.Event().wait()
                return messages.pop()

            async def send(message: dict[str, Any]) -> None:
                sent.append(message)

            await middleware(scope, receive, send)

        answers: list[list[Any]] = [[] for _ in range(4)]
        tasks = [asyncio.create_task(slowly(100, answer)) for answer in answers[:2]]
        await asyncio.sleep(0.05)
        assert (await request(middleware, {"messages": [user("hi")]}))[0] == 200
        await slowly(100, answers[2])
        assert answers[2][0]["status"] == 503
        assert "may have 250 bytes in total, got 200" in json.loads(answers[2][1]["body"])["error"]["message"]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert middleware.intake.held == 0

    asyncio.run(crowd())


REFUSED = {
    "pixels": (400, {"messages": [user(QUESTION, data_uri(png_claiming(6_000)))]}),
    "none of BMP, GIF": (400, {"messages": [user(QUESTION, data_uri(b"nothing"))]}),
    "must have at most 2000 bytes": (413, {"messages": [user(QUESTION, data_uri(bytes(3_000)))]}),
    "list of allowed image hosts": (400, {"messages": [user(QUESTION, "http://169.254.169.254/latest")]}),
    "must be a data URI": (400, {"messages": [user(QUESTION, "file:///etc/passwd")]}),
    "`messages[0].content[0].type` ... got 'audio_url'": (
        400,
        {"messages": [{"role": "user", "content": [{"type": "audio_url"}]}]},
    ),
    "`messages[0].content[0].image_url` ... got 'x'": (
        400,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
    ),
    "`messages[0].content[0].image_url.url` ... got 1": (
        400,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 1}}]}]},
    ),
    "media_io_kwargs": (400, {"messages": [user(QUESTION)], "media_io_kwargs": {"image": {}}}),
    "chat_template": (400, {"messages": [user(QUESTION)], "chat_template": "{{ 1 }}"}),
    "`mm_processor_kwargs` ... got [1]": (400, {"messages": [user(QUESTION)], "mm_processor_kwargs": [1]}),
    "`messages[0].role` ... got 'assistant'": (400, {"messages": [ANSWER, user(QUESTION)]}),
    "`messages[1].role` ... got 'system'": (400, {"messages": [user(QUESTION), SYSTEM, user(QUESTION)]}),
    "`messages[1].role` ... got 'assistant'": (400, {"messages": [user(QUESTION), ANSWER]}),
    "`messages[0].role` ... got 'user'": (400, {"messages": [user(QUESTION)], "continue_final_message": True}),
    "`messages[0].tool_calls` ... got [7]": (400, {"messages": [{**user(QUESTION), "tool_calls": [7]}]}),
    "`tools` ... got [7]": (400, {"messages": [user(QUESTION)], "tool_choice": "required", "tools": [7]}),
    "`max_tokens` ... got 0": (400, {"messages": [user(QUESTION)], "max_tokens": 0}),
    "not valid JSON in UTF-8": (400, b'{"messages": "\xff"}'),
    "body of a request must have at most 100000 bytes": (413, b" " * 200_000),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_come_through(words):
    status, content = REFUSED[words]
    middleware = make_middleware(limits=Limits(image_bytes=2_000, image_pixels=1_000_000, body_bytes=100_000))
    answer = ask(middleware, content)
    assert answer[0] == status, answer
    assert all(part in answer[1]["error"]["message"] for part in words.split(" ... "))
    assert middleware.app.bodies == []


@pytest.mark.parametrize("path", ["/v1/responses", "/tokenize", "/pooling", "/v1/load_lora_adapter", "/invocations"])
def test_other_paths_are_closed(path):
    middleware = make_middleware()
    status, reply = ask(middleware, {}, path=path)
    assert status == 404
    assert f"POST {CHAT}" in reply["error"]["message"]
    assert ("set_default_openai_api('chat_completions')" in reply["error"]["message"]) == (path == "/v1/responses")
    assert ask(middleware, {}, path=path, method="GET")[0] == 404
    assert ask(middleware, {"prompt": "x"}, path=COMPLETIONS)[0] == 200
    assert ask(middleware, {}, path="/metrics", method="GET")[0] == 200
    assert len(middleware.app.bodies) == 2


def test_a_form_of_a_web_page_is_refused():
    assert ask(make_middleware(), {"messages": []}, headers=((b"content-type", b"text/plain"),))[0] == 415


def test_the_key(monkeypatch):
    monkeypatch.setenv("FUSION_KEY", KEY)
    middleware = make_middleware(api_key_env="FUSION_KEY")
    content = {"messages": [user(QUESTION)]}
    assert ask(middleware, content)[0] == 401
    assert ask(middleware, {}, path="/metrics", method="GET")[0] == 401
    assert ask(middleware, {}, path="/health", method="GET")[0] == 200
    assert ask(middleware, content, headers=(JSON_TYPE, (b"authorization", f"Bearer {KEY}".encode())))[0] == 200


def test_a_full_queue():
    async def crowd() -> list[int]:
        middleware = make_middleware(limits=Limits(parallel=1, queue_length=1))
        middleware.app.may_answer.clear()
        tasks = [asyncio.create_task(request(middleware, {"messages": [user(QUESTION)]})) for _ in range(4)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        middleware.app.may_answer.set()
        statuses = [status for status, _ in await asyncio.gather(*tasks)]
        assert (await request(middleware, {"messages": [user(QUESTION)]}))[0] == 200
        return statuses

    assert sorted(asyncio.run(crowd())) == [200, 200, 429, 429]
