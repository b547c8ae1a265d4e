"""Requests as they are read: orders of messages, fields that ask for nothing, and the errors of all others."""

import itertools
import re
from typing import Any

import pytest
from tests.helpers.serving import MODEL, QUESTION, user

from fusion_hf.inference import ChatModel
from fusion_hf.serving import fields
from fusion_hf.serving.api_errors import ApiError
from fusion_hf.serving.chat_requests import ChatRequest, parse_chat_request
from fusion_hf.serving.limits import Limits
from fusion_hf.serving.messages import ROLES, Chat, parse_messages

URL, OTHER_URL = "https://images.example/a.png", "https://images.example/b.png"
MORE = "and its shape?"
SYSTEM = {"role": "system", "content": "Answer in one word."}
DEVELOPER = {"role": "developer", "content": "Be kind."}
ANSWER = {"role": "assistant", "content": "red"}
MOST = 64


def parse(**changes: Any) -> ChatRequest:
    content = {"model": MODEL, "messages": [user(QUESTION)], **changes}
    return parse_chat_request(content, MODEL, Limits(answer_tokens=MOST))


def outline(chat: Chat) -> list[tuple[str, str, int]]:
    """Role, text and number of images of each message."""
    return [
        (
            message["role"],
            "".join(block["text"] for block in message["content"] if block["type"] == "text"),
            sum(block["type"] == "image" for block in message["content"]),
        )
        for message in chat.messages
    ]


# orders of messages

JOINED = {
    "users": ([user(QUESTION), user(MORE)], [("user", f"{QUESTION}\n\n{MORE}", 0)]),
    "users, image first": ([user(QUESTION, URL), user(MORE)], [("user", f"{QUESTION}\n\n{MORE}", 1)]),
    "users, image last": ([user(QUESTION), user(MORE, URL)], [("user", f"{QUESTION}\n\n{MORE}", 1)]),
    "users, image alone": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]}, user(QUESTION)],
        [("user", QUESTION, 1)],
    ),
    "systems": (
        [SYSTEM, DEVELOPER, user(QUESTION)],
        [("system", "Answer in one word.\n\nBe kind.", 0), ("user", QUESTION, 0)],
    ),
    "assistants": (
        [user(QUESTION), ANSWER, {"role": "assistant", "content": "It is red."}, user(MORE)],
        [("user", QUESTION, 0), ("assistant", "red\n\nIt is red.", 0), ("user", MORE, 0)],
    ),
    "an assistant that says nothing": (
        [user(QUESTION), {"role": "assistant", "content": None}, user(MORE)],
        [("user", QUESTION, 0), ("assistant", "", 0), ("user", MORE, 0)],
    ),
    "the same image twice": (
        [user(QUESTION, URL), ANSWER, user(MORE, URL)],
        [("user", QUESTION, 1), ("assistant", "red", 0), ("user", MORE, 0)],
    ),
    "the same image alone": (
        [user(QUESTION, URL), ANSWER, {"role": "user", "content": user("", URL)["content"][1:]}, user(MORE)],
        [("user", QUESTION, 1), ("assistant", "red", 0), ("user", MORE, 0)],
    ),
}


@pytest.mark.parametrize("name", JOINED)
def test_neighbours_of_one_role_are_joined(name: str):
    messages, expected = JOINED[name]
    chat = parse_messages(messages)
    assert outline(chat) == expected
    assert chat.image == (URL if any(images for *_, images in expected) else None)


def test_a_message_without_neighbours_keeps_its_parts():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": " b"}]
    chat = parse_messages([{"role": "user", "content": parts}])
    assert chat.messages == [{"role": "user", "content": parts}]


WRONG_ORDERS = {
    "assistant first": ([ANSWER, user(QUESTION)], "messages[0].role", "assistant"),
    "assistant after system": ([SYSTEM, DEVELOPER, ANSWER, user(QUESTION)], "messages[2].role", "assistant"),
    "system between questions": ([user(QUESTION), SYSTEM, user(MORE)], "messages[1].role", "system"),
    "developer in the middle": ([user(QUESTION), ANSWER, DEVELOPER, user(MORE)], "messages[2].role", "developer"),
    "system last": ([user(QUESTION), SYSTEM], "messages[1].role", "system"),
    "assistant last": ([user(QUESTION), ANSWER, ANSWER], "messages[2].role", "assistant"),
    "only system": ([SYSTEM, SYSTEM], "messages[1].role", "system"),
    "tool": ([user(QUESTION), {"role": "tool", "content": "7", "tool_call_id": None}], "messages[1].role", "tool"),
}


@pytest.mark.parametrize("name", WRONG_ORDERS)
def test_other_orders_are_refused_by_index(name: str):
    messages, param, role = WRONG_ORDERS[name]
    with pytest.raises(ApiError) as refused:
        parse_messages(messages)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert f"`{param}` must be " in refused.value.message and f"got {role!r}" in refused.value.message
    assert "user" in refused.value.message.partition(" must be ")[2]


def test_an_answer_is_continued_only_where_the_request_says_so():
    messages = [user(QUESTION), ANSWER]
    assert outline(parse_messages(messages, ends_with_answer=True))[-1] == ("assistant", "red", 0)
    with pytest.raises(ApiError) as refused:
        parse_messages([user(QUESTION)], ends_with_answer=True)
    assert "'assistant'" in refused.value.message


def test_two_images_are_still_two():
    with pytest.raises(ApiError) as refused:
        parse_messages([user(QUESTION, URL), ANSWER, user(MORE, OTHER_URL), ANSWER, user(MORE, URL)])
    assert "at most 1 image, got 2" in refused.value.message


ANSWERED = ["users", "systems", "assistants", "an assistant that says nothing"]


@pytest.mark.parametrize("name", ANSWERED)
def test_joined_messages_are_a_prompt_of_the_model(chat_model: ChatModel, name: str):
    """Each question has its latent block and each block its answer's header: the model answers."""
    messages, expected = JOINED[name]
    written = [{"role": role, "content": text} for role, text, _ in expected]
    assert chat_model.answer(parse_messages(messages).messages, 4) == chat_model.answer(written, 4)


LENGTH = 4  # of the longest order that is tried


def test_every_order_is_answered_or_refused_by_index(chat_model: ChatModel):
    answers: dict[tuple[str, ...], str] = {}
    orders = [order for length in range(1, LENGTH + 1) for order in itertools.product(ROLES, repeat=length)]
    for order in orders:
        try:
            chat = parse_messages([{"role": role, "content": "a"} for role in order])
        except ApiError as error:
            refused = re.fullmatch(r"messages\[(\d)\]\.role", str(error.param))
            assert refused is not None and order[int(refused[1])] in error.message, order
            continue
        roles = tuple(message["role"] for message in chat.messages)
        if roles not in answers:  # the model refuses a prompt with a question that no answer follows
            answers[roles] = chat_model.answer(chat.messages, 1)
    turns = ("user", "assistant", "user")
    assert answers.keys() == {("user",), turns, ("system", "user"), ("system", *turns)}


# fields

TABLES = {
    "": fields.REQUEST,
    "stream_options": fields.STREAM_OPTIONS,
    "messages[0]": fields.MESSAGE,
    "messages[0].content[0]": fields.TEXT_PART,
    "messages[0].content[1]": fields.IMAGE_PART,
    "messages[0].content[1].image_url": fields.IMAGE_URL,
}


def request_with(where: str, name: str, value: Any) -> dict[str, Any]:
    """A request with an image that has one more field somewhere."""
    message = user(QUESTION, URL)
    content: dict[str, Any] = {"model": MODEL, "messages": [message], "stream": True, "stream_options": {}}
    places = {
        "": content,
        "stream_options": content["stream_options"],
        "messages[0]": message,
        "messages[0].content[0]": message["content"][0],
        "messages[0].content[1]": message["content"][1],
        "messages[0].content[1].image_url": message["content"][1]["image_url"],
    }
    places[where][name] = value
    return content


def neutral_values() -> list[tuple[str, str, Any]]:
    return [
        (where, name, value)
        for where, table in TABLES.items()
        for name, values in {**table.neutral, **dict.fromkeys(table.ignored, ("x", {"a": ["b"]}))}.items()
        for value in (*values, None)
    ]


@pytest.mark.parametrize(("where", "name", "value"), neutral_values())
def test_what_asks_for_nothing_changes_nothing(where: str, name: str, value: Any):
    plain = parse(messages=[user(QUESTION, URL)], stream=True)
    assert parse_chat_request(request_with(where, name, value), MODEL, Limits(answer_tokens=MOST)) == plain


@pytest.mark.parametrize(
    ("where", "name"), [(where, name) for where, table in TABLES.items() for name in table.neutral]
)
def test_what_asks_for_something_is_named_with_the_allowed_values(where: str, name: str):
    with pytest.raises(ApiError) as refused:
        parse_chat_request(request_with(where, name, "something"), MODEL, Limits())
    full_name = f"{where}.{name}" if where else name
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, full_name, "unsupported_value")
    assert refused.value.message.startswith(f"`{full_name}` must be ") and "'something'" in refused.value.message


@pytest.mark.parametrize("where", TABLES)
def test_unknown_fields_are_named(where: str):
    with pytest.raises(ApiError) as refused:
        parse_chat_request(request_with(where, "foo", []), MODEL, Limits())
    assert refused.value.param == (f"{where}.foo" if where else "foo")


# the issue's own list, so that nobody takes a value from a table without noticing
NOTHING: list[tuple[str, Any]] = [
    ("functions", []), ("tools", []), ("function_call", "none"), ("tool_choice", "none"), ("tool_choice", "auto"),
    ("repetition_penalty", 1), ("repetition_penalty", 1.0), ("top_k", -1), ("top_k", 0), ("min_p", 0), ("min_p", 0.0),
    ("ignore_eos", False), ("chat_template_kwargs", {}), ("stop_token_ids", []), ("best_of", 1), ("echo", False),
    ("reasoning_effort", "none"), ("logit_bias", {}), ("logprobs", False), ("n", 1), ("user", "ann"),
    ("metadata", {"a": "b"}), ("store", False), ("service_tier", "auto"), ("parallel_tool_calls", True),
    ("parallel_tool_calls", False), ("response_format", {"type": "text"}), ("stream_options", None), ("seed", None),
    ("stream_options", {"include_usage": None}), ("stop", []), ("modalities", ["text"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), NOTHING)
def test_values_of_real_tools_that_ask_for_nothing(name: str, value: Any):
    assert parse(**{name: value}) == parse()


@pytest.mark.parametrize("name", [name for name in fields.REQUEST.known if name not in ("model", "messages")])
def test_null_counts_as_absent(name: str):
    assert parse(**{name: None}) == parse()


SOMETHING = {
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "reasoning_effort": "low",
    "chat_template_kwargs": {"enable_thinking": True},
    "ignore_eos": True,
    "echo": True,
    "best_of": 2,
    "stop_token_ids": [2],
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "tool_choice": "required",
    "store": True,
    "response_format": {"type": "json_object"},
    "n": True,
    "echo ": False,
}


@pytest.mark.parametrize("name", SOMETHING)
def test_values_that_ask_for_something(name: str):
    with pytest.raises(ApiError) as refused:
        parse(**{name: SOMETHING[name]})
    assert (refused.value.status, refused.value.param) == (400, name)


def test_tools_are_named_before_their_choice():
    with pytest.raises(ApiError) as refused:
        parse(tool_choice="required", tools=[{"type": "function"}])
    assert refused.value.param == "tools"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_longer_answers_than_the_server_gives_are_capped(name: str):
    assert [parse(**{name: given}).max_tokens for given in (1, MOST, MOST + 1, 10**30)] == [1, MOST, MOST, MOST]
    with pytest.raises(ApiError) as refused:
        parse(**{name: 0})
    assert refused.value.param == name


def test_usage_without_stream_is_refused_and_no_usage_is_not():
    assert parse(stream_options={"include_usage": False}) == parse()
    with pytest.raises(ApiError) as refused:
        parse(stream_options={"include_usage": True})
    assert refused.value.param == "stream_options"
