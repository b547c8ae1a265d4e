"""The JSON of a chat request, checked: what is unknown or cannot be done is refused, never passed over in silence."""

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

from fusion_hf.model.configuration_fusion import is_perfect_square
from fusion_hf.serving.api_errors import BAD_REQUEST, NOT_FOUND, ApiError, wrong_value
from fusion_hf.serving.fields import REQUEST, STREAM_OPTIONS
from fusion_hf.serving.limits import Limits
from fusion_hf.serving.messages import parse_messages

MAX_JSON_MARKS = 2**17  # commas and opening brackets: each may become an object that is far larger than its bytes
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256
MAX_TEMPERATURE = 2.0
SEED_BITS = 64


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; a temperature of 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class ChatRequest:
    """
    messages: of the ecosystem, with a block `{"type": "image"}` in the image's place.
    image: its data URI or address, or its bytes.
    max_tokens: of the answer.
    stop: the answer ends before the first of them.
    query_len, image_token_grid: see `ChatModel.answer`.
    """

    messages: list[dict[str, Any]]
    image: str | bytes | None
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    query_len: int | None
    image_token_grid: int | None


def load_json(body: bytes) -> dict[str, Any]:
    """Read a JSON object, or raise an `ApiError` if it is none in UTF-8, is deep or has very many values."""
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
    given = REQUEST.select(content)
    _check_model(given.get("model"), model)
    chat = parse_messages(given.get("messages"))
    stream = _flag(given, "stream")
    return ChatRequest(
        messages=chat.messages,
        image=chat.image,
        max_tokens=parse_max_tokens(given, limits.answer_tokens),
        sampling=_sampling(given),
        stop=_stops(given.get("stop")),
        stream=stream,
        include_usage=_include_usage(given.get("stream_options"), stream),
        query_len=_query_len(given),
        image_token_grid=_whole(given, "image_token_grid"),
    )


def _check_model(name: Any, model: str) -> None:
    if not isinstance(name, str):
        raise wrong_value("model", name, repr(model))
    if name != model:
        error = wrong_value("model", name, repr(model))
        raise ApiError(NOT_FOUND, error.message, "model", "model_not_found")


def _flag(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise wrong_value(name, value, "true, false")
    return value


def _whole(given: dict[str, Any], name: str, least: int = 1, most: float = math.inf) -> int | None:
    allowed = f"a whole number from {least}" + ("" if most == math.inf else f" to {most}")
    return _number(given, name, allowed, least, most, kinds=(int,))


def _query_len(given: dict[str, Any]) -> int | None:
    length = _whole(given, "query_len")
    if length is not None and not is_perfect_square(length):
        raise wrong_value("query_len", length, "a perfect square (1, 4, 9, 16, ...)")
    return length


def parse_max_tokens(given: dict[str, Any], most: int) -> int:
    """
    Read the longest answer that a request allows, under both of its names.

    Args:
        given: The request.
        most: The server's limit in tokens. A request that allows more gets it, as clients know it of other servers.

    Returns:
        Tokens.

    Raises:
        ApiError: For anything but a whole number from 1, and for two different ones.
    """
    lengths = [_whole(given, name) for name in ("max_completion_tokens", "max_tokens")]
    known = [length for length in lengths if length is not None]
    if len(set(known)) > 1:
        raise wrong_value("max_tokens", known[1], f"{known[0]}, as max_completion_tokens, or only one of the two")
    return min(known[0], most) if known else most


def _number(
    given: dict[str, Any], name: str, allowed: str, least: float, most: float, kinds: tuple[type, ...] = (int, float)
) -> Any:
    value = given.get(name)
    if value is not None and (type(value) not in kinds or not least <= value <= most):
        raise wrong_value(name, value, allowed)
    return value


def _sampling(given: dict[str, Any]) -> Sampling:
    temperature = _number(given, "temperature", f"a number from 0 to {MAX_TEMPERATURE:g}", 0.0, MAX_TEMPERATURE)
    top_p = _number(given, "top_p", "a number above 0, up to 1", 0.0, 1.0)
    if top_p == 0:
        raise wrong_value("top_p", top_p, "a number above 0, up to 1")
    if temperature is None and top_p not in (None, 1.0):
        raise wrong_value("top_p", top_p, "1, or give a temperature: it is 0 where there is none")
    seed = _whole(given, "seed", -(2 ** (SEED_BITS - 1)), 2 ** (SEED_BITS - 1) - 1)
    return Sampling(float(temperature or 0), 1.0 if top_p is None else float(top_p), seed)


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
    allowed = 'an object {"include_usage": true or false}, with stream'
    if not isinstance(given, dict):
        raise wrong_value("stream_options", given, allowed)
    wanted = _flag(STREAM_OPTIONS.select(given, "stream_options"), "include_usage")
    if wanted and not stream:
        raise wrong_value("stream_options", given, allowed)
    return wanted
