"""Structured answers of a language model: how their format is requested, checked, and requested again."""

import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from datatrove.pipeline.inference.types import InferenceError, InferenceResult
from pydantic import BaseModel, ValidationError

from fusion_hf.synthesis.run_config import EndpointSettings

Generate = Callable[[dict[str, Any]], Awaitable[InferenceResult]]

CUT = "length"  # the finish reason of a truncated answer
MAX_SEED = 2**31 - 1  # some servers store seeds in 32 bits
SEED_STEP = 7919  # difference between the seeds of two tries
TOKENS = ("prompt_tokens", "completion_tokens")  # keys in the usage of a response
SHOWN = 200  # maximum number of characters of an error message


@dataclass(frozen=True)
class StructuredAnswer:
    """
    The result of a structured request.

    Attributes:
        answer: the answer, or None if there is no valid one.
        reason: why there is no valid answer.
        seed: the seed of the last try.
        usage: the number of requests and tokens of all tries.
    """

    answer: Any
    reason: str | None
    seed: int
    usage: dict[str, int]


def hash_prompt(prompt: str) -> str:
    """
    Return the SHA-256 of a text as hexadecimal digits.

    Args:
        prompt: the text.
    """
    return hashlib.sha256(prompt.encode("utf-8", "backslashreplace")).hexdigest()


def usage_of(result: InferenceResult) -> dict[str, int]:
    """
    Count one request and its tokens.

    Args:
        result: the result of the request.
    """
    return {"requests": 1, **{name: result.usage.get(name, 0) for name in TOKENS}}


def make_payload(endpoint: EndpointSettings, prompt: str | list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """
    Make the payload of a chat request.

    Args:
        endpoint: the settings of the endpoint.
        prompt: a text, or the content blocks of a message.
        seed: the seed of the request.
    """
    return {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": endpoint.temperature,
        "max_tokens": endpoint.max_tokens,
        "seed": seed,
        **endpoint.arguments,
    }


async def ask_structured(
    generate: Generate, endpoint: EndpointSettings, prompt: str, model: type[BaseModel], seed: int
) -> StructuredAnswer:
    """
    Ask until an answer is a valid `model`.

    Each try has another seed, since the request cache would answer the same request.

    Args:
        generate: sends a request.
        endpoint: the settings of the endpoint.
        prompt: the prompt.
        model: the pydantic model of the answer.
        seed: the seed of the first try.
    """
    schema = model.model_json_schema()
    reason = ""
    usage: Counter[str] = Counter()
    for attempt in range(endpoint.tries):
        tried = (seed + attempt * SEED_STEP) % MAX_SEED
        try:
            result = await generate(_shaped(endpoint, prompt, model.__name__, schema, tried))
        except InferenceError as error:
            return StructuredAnswer(None, f"refused: {error.error}", tried, dict(usage))
        usage.update(usage_of(result))
        if result.finish_reason == CUT:
            reason = f"the answer is longer than {endpoint.max_tokens} tokens"
            continue
        try:
            return StructuredAnswer(model.model_validate_json(_json_part(result.text)), None, tried, dict(usage))
        except ValidationError as error:
            reason = _what_is_wrong(error)
    return StructuredAnswer(None, f"no valid answer in {endpoint.tries} tries: {reason}", tried, dict(usage))


def _shaped(endpoint: EndpointSettings, prompt: str, name: str, schema: dict[str, Any], seed: int) -> dict[str, Any]:
    """Make a request that asks for the format of its answer by `response_format`, in the prompt, or both."""
    if endpoint.structured != "json_schema":
        prompt += f"\n\nAnswer with one JSON object of this schema and nothing else:\n{json.dumps(schema)}"
    payload = make_payload(endpoint, prompt, seed)
    if endpoint.structured == "json_schema":
        json_schema = {"name": name, "schema": schema, "strict": True}
        payload["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    elif endpoint.structured == "json_object":
        payload["response_format"] = {"type": "json_object"}
    return payload


def _json_part(text: str) -> str:
    """
    Return the text from the first brace to the last, since some models put words or a code fence around their
    JSON.
    """
    begin, end = text.find("{"), text.rfind("}")
    return text[begin : end + 1] if 0 <= begin < end else text


def _what_is_wrong(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place + ': ' if place else ''}{first['msg']}"[:SHOWN]
