"""Parse and check the JSON of a chat request. Unknown or unsupported fields are errors and never silently ignored."""

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

from fusion_hf.model.configuration_fusion import is_perfect_square
from fusion_hf.serving.api_errors import BAD_REQUEST, NOT_FOUND, ApiError, wrong_value
from fusion_hf.serving.fields import REQUEST, STREAM_OPTIONS
from fusion_hf.serving.limits import Limits
from fusion_hf.serving.messages import parse_messages

MAX_JSON_MARKS = 2**17  # maximum number of commas and opening brackets, each of which may become a much larger object
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256
MAX_TEMPERATURE = 2.0
SEED_BITS = 64


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. A temperature of 0 selects the most likely token."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class ChatRequest:
    """
    A parsed chat request.

    Attributes:
        messages: the messages in the format of transformers, with a block `{"type": "image"}` for the image.
        image: the data URI, the address or the bytes of the image.
        max_tokens: the maximum number of tokens of the answer.
        sampling: how tokens are drawn.
        stop: texts before which the answer ends.
        stream: whether the answer is streamed.
        include_usage: whether a streamed answer ends with the usage.
        query_len: the number of latent tokens, see `ChatModel.answer`.
        image_token_grid: the side of the grid of image tokens, see `ChatModel.answer`.
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
    """
    Parse a JSON object.

    Args:
        body: the bytes of the body.

    Raises:
        ApiError: if the body is not a JSON object in UTF-8, is nested too deeply, or has too many values.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_MARKS:
        raise ApiError(BAD_REQUEST, f"The body must have at most {MAX_JSON_MARKS} values.")
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(BAD_REQUEST, f"The body is not valid JSON in UTF-8: {reason}.") from error
    if not isinstance(content, dict):
        raise ApiError(BAD_REQUEST, f"The body must be a JSON object, got {type(content).__name__}.")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def parse_chat_request(content: dict[str, Any], model: str, limits: Limits) -> ChatRequest:
    """
    Parse and check a chat request.

    Args:
        content: the JSON object. Fields that are null count as absent.
        model: the name of the server's model.
        limits: the limits on requests.

    Raises:
        ApiError: if a field is invalid. The message names the field, its value and the allowed values.
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
        raise wrong_value(name, value, "true or false")
    return value


def _whole(given: dict[str, Any], name: str, least: int = 1, most: float = math.inf) -> int | None:
    allowed = f"an integer of at least {least}" if most == math.inf else f"an integer from {least} to {most}"
    return _number(given, name, allowed, least, most, kinds=(int,))


def _query_len(given: dict[str, Any]) -> int | None:
    length = _whole(given, "query_len")
    if length is not None and not is_perfect_square(length):
        raise wrong_value("query_len", length, "a perfect square (1, 4, 9, 16, ...)")
    return length


def parse_max_tokens(given: dict[str, Any], most: int) -> int:
    """
    Read the maximum length of the answer, under both of its names.

    Args:
        given: the fields of the request.
        most: the limit of the server in tokens. Larger values are reduced to it, as other servers do.

    Returns:
        The number of tokens.

    Raises:
        ApiError: if a value is not an integer of at least 1, or both names have different values.
    """
    lengths = [_whole(given, name) for name in ("max_completion_tokens", "max_tokens")]
    known = [length for length in lengths if length is not None]
    if len(set(known)) > 1:
        raise wrong_value("max_tokens", known[1], f"equal to `max_completion_tokens` ({known[0]}) or left out")
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
    top_p = _number(given, "top_p", "a number above 0 and up to 1", 0.0, 1.0)
    if top_p == 0:
        raise wrong_value("top_p", top_p, "a number above 0 and up to 1")
    if temperature is None and top_p not in (None, 1.0):
        raise wrong_value("top_p", top_p, "1 unless you also set `temperature`, whose default is 0")
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
