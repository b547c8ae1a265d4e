"""The JSON of a chat request, checked: what is unknown or cannot be done is refused, never passed over in silence."""

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from fusion_hf.configuration_fusion import is_perfect_square
from fusion_hf.serving.errors import BAD_REQUEST, NOT_FOUND, ApiError, wrong_value
from fusion_hf.serving.limits import MAX_IMAGES, Limits

MAX_JSON_MARKS = 2**17  # commas and opening brackets: each may become an object that is far larger than its bytes
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256
MAX_TEMPERATURE = 2.0
SEED_BITS = 64
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
KNOWN = (
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream",
    "stream_options", "query_len", "image_token_grid",
)  # fmt: skip
# Of what this server does not do, the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),  # of no tools
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# What does not change an answer, whatever its value.
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; a temperature of 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class ChatRequest:
    """
    messages: of the ecosystem, with a block `{"type": "image"}` in the picture's place.
    picture: its data URI or address, or its bytes.
    max_tokens: of the answer.
    stop: the answer ends before the first of them.
    query_len, image_token_grid: see `Assistant.answer`.
    """

    messages: list[dict[str, Any]]
    picture: str | bytes | None
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    query_len: int | None
    image_token_grid: int | None


def load_json(body: bytes) -> dict[str, Any]:
    """
    Raises:
        ApiError: if it is no JSON object in UTF-8, or one that is deep or has very many values.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_MARKS:
        raise ApiError(BAD_REQUEST, f"The body has too many values; allowed: {MAX_JSON_MARKS}.")
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ApiError(BAD_REQUEST, f"The body is no JSON in UTF-8: {reason}.") from error
    if not isinstance(content, dict):
        raise ApiError(BAD_REQUEST, f"The body is a JSON {type(content).__name__}; allowed: an object.")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def parse_chat_request(content: dict[str, Any], model: str, limits: Limits) -> ChatRequest:
    """
    Args:
        content: the JSON; a field that is null counts as absent.
        model: the name that this server's model has.

    Raises:
        ApiError: names the field, its value and the allowed ones.
    """
    given = {name: value for name, value in content.items() if value is not None}
    _check_names(given)
    _check_model(given.get("model"), model)
    messages, pictures = _parse_messages(given.get("messages"))
    stream = _flag(given, "stream")
    return ChatRequest(
        messages=messages,
        picture=pictures[0] if pictures else None,
        max_tokens=_max_tokens(given, limits.answer_tokens),
        sampling=_sampling(given),
        stop=_stops(given.get("stop")),
        stream=stream,
        include_usage=_include_usage(given.get("stream_options"), stream),
        query_len=_query_len(given),
        image_token_grid=_whole(given, "image_token_grid", 1, None),
    )


def _check_names(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name in NEUTRAL:
            if not any(_same(value, allowed) for allowed in NEUTRAL[name]):
                raise wrong_value(name, value, ", ".join(map(json.dumps, NEUTRAL[name])), "unsupported_value")
        elif name not in KNOWN and name not in IGNORED:
            raise wrong_value(name, value, f"no such field; known ones: {', '.join(KNOWN)}", "unknown_parameter")


def _same(value: Any, allowed: Any) -> bool:
    """Whether they are equal, where `true` is not 1."""
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed


def _check_model(name: Any, model: str) -> None:
    if not isinstance(name, str):
        raise wrong_value("model", name, repr(model))
    if name != model:
        error = wrong_value("model", name, repr(model))
        raise ApiError(NOT_FOUND, error.message, "model", "model_not_found")


def _parse_messages(given: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages of the ecosystem, and their pictures."""
    if not isinstance(given, list) or not given:
        raise wrong_value("messages", given, "a list of one or more messages")
    messages: list[dict[str, Any]] = []
    pictures: list[str] = []
    for index, message in enumerate(given):
        messages.append(_parse_message(message, f"messages[{index}]", pictures))
    check_count(len(pictures))
    last, where = messages[-1], f"messages[{len(messages) - 1}]"
    if last["role"] != "user":
        raise wrong_value(f"{where}.role", last["role"], "'user': the last message is the question")
    if not any(block["type"] == "text" and block["text"].strip() for block in last["content"]):
        raise ApiError(BAD_REQUEST, f"{where}.content has no text; allowed: a question.", f"{where}.content")
    return messages, pictures


def check_count(images: int) -> None:
    """
    Raises:
        ApiError: if messages have more images than FUSION reads.
    """
    if images > MAX_IMAGES:
        raise ApiError(BAD_REQUEST, f"messages have {images} images; allowed: {MAX_IMAGES}.", "messages")


def _parse_message(message: Any, where: str, pictures: list[str]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise wrong_value(where, message, "an object with role and content")
    given = {name: value for name, value in message.items() if value is not None}
    for name, value in given.items():
        # a client that sends an answer back sends its empty lists as well
        if name not in ("role", "content") and value != []:
            raise wrong_value(f"{where}.{name}", value, "no such field; known ones: role, content")
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong_value(f"{where}.role", role, ", ".join(ROLES))
    content = given.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise wrong_value(f"{where}.content", content, "a text, or a list of one or more parts")
    blocks = [_parse_part(part, role, f"{where}.content[{index}]", pictures) for index, part in enumerate(content)]
    return {"role": ROLES[role], "content": blocks}


def _parse_part(part: Any, role: str, where: str, pictures: list[str]) -> dict[str, Any]:
    kinds = ("text", "image_url") if role == "user" else ("text",)
    kind = part.get("type") if isinstance(part, dict) else part
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in kinds:
        raise wrong_value(f"{where}.type", kind, f"{', '.join(kinds)} in a message of role {role}")
    _check_keys(part, ("type", kind), where)
    if kind == "text":
        return {"type": "text", "text": _text(part.get("text"), f"{where}.text")}
    image = part.get("image_url")
    if not isinstance(image, dict):
        raise wrong_value(f"{where}.image_url", image, 'an object: {"url": "..."}')
    _check_keys(image, ("url", "detail"), f"{where}.image_url")
    if image.get("detail") not in (None, "auto"):
        raise wrong_value(f"{where}.image_url.detail", image["detail"], "'auto'; query_len is this model's detail")
    pictures.append(_text(image.get("url"), f"{where}.image_url.url"))
    return {"type": "image"}


def _check_keys(given: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for name, value in given.items():
        if name not in known and value is not None:
            raise wrong_value(f"{where}.{name}", value, f"no such field; known ones: {', '.join(known)}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise wrong_value(where, value, "a text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ApiError(BAD_REQUEST, f"{where} has half a character: {error.reason}.", where) from error
    return value


def _flag(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise wrong_value(name, value, "true, false")
    return value


def _whole(given: dict[str, Any], name: str, least: int, most: int | None) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        raise wrong_value(name, value, f"a whole number from {least}" + ("" if most is None else f" to {most}"))
    return value


def _query_len(given: dict[str, Any]) -> int | None:
    length = _whole(given, "query_len", 1, None)
    if length is not None and not is_perfect_square(length):
        raise wrong_value("query_len", length, "a perfect square (1, 4, 9, 16, ...)")
    return length


def _max_tokens(given: dict[str, Any], most: int) -> int:
    lengths = [_whole(given, name, 1, most) for name in ("max_completion_tokens", "max_tokens")]
    known = [length for length in lengths if length is not None]
    if len(set(known)) > 1:
        raise wrong_value("max_tokens", known[1], f"{known[0]}, as max_completion_tokens, or only one of the two")
    return known[0] if known else most


def _number(given: dict[str, Any], name: str, allowed: str, least: float, most: float) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
        raise wrong_value(name, value, allowed)
    return float(value)


def _sampling(given: dict[str, Any]) -> Sampling:
    temperature = _number(given, "temperature", f"a number from 0 to {MAX_TEMPERATURE:g}", 0.0, MAX_TEMPERATURE)
    top_p = _number(given, "top_p", "a number above 0, up to 1", 0.0, 1.0)
    if top_p == 0.0:
        raise wrong_value("top_p", top_p, "a number above 0, up to 1")
    if temperature is None and top_p not in (None, 1.0):
        raise wrong_value("top_p", top_p, "1, or give a temperature: it is 0 where there is none")
    seed = _whole(given, "seed", -(2 ** (SEED_BITS - 1)), 2 ** (SEED_BITS - 1) - 1)
    return Sampling(temperature or 0.0, 1.0 if top_p is None else top_p, seed)


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else [] if given is None else given
    fitting = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not fitting or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        allowed = f"a text of 1 to {MAX_STOP_CHARACTERS} characters, or a list of up to {MAX_STOPS} of them"
        raise wrong_value("stop", given, allowed)
    return tuple(stops)


def _include_usage(given: Any, stream: bool) -> bool:
    if given is None:
        return False
    if not stream or not isinstance(given, dict):
        raise wrong_value("stream_options", given, 'an object {"include_usage": true or false}, with stream')
    _check_keys(given, ("include_usage", "include_obfuscation"), "stream_options")
    if given.get("include_obfuscation"):
        raise wrong_value("stream_options.include_obfuscation", given["include_obfuscation"], "false")
    return _flag(given, "include_usage")
