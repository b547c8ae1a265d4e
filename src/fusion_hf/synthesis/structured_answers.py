"""Structured answers of a language model: how their shape is asked for, checked, and asked for again."""

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

CUT = "length"  # the finish reason of an answer that was not finished
MAX_SEED = 2**31 - 1  # some servers hold a seed in 32 bits
SEED_STEP = 7919  # between two tries
TOKENS = ("prompt_tokens", "completion_tokens")  # of a response's usage
SHOWN = 200  # characters of what is wrong with an answer


@dataclass(frozen=True)
class StructuredAnswer:
    """
    What became of a structured request.

    Attributes:
        answer: None if there is a `reason` why there is no valid one.
        seed: of the last try.
        usage: requests and tokens of all tries.
    """

    answer: Any
    reason: str | None
    seed: int
    usage: dict[str, int]


def hash_prompt(prompt: str) -> str:
    """Hash a text, such as a prompt: SHA-256 in hexadecimal digits."""
    return hashlib.sha256(prompt.encode("utf-8", "backslashreplace")).hexdigest()


def usage_of(result: InferenceResult) -> dict[str, int]:
    """Count one request and its tokens."""
    return {"requests": 1, **{name: result.usage.get(name, 0) for name in TOKENS}}


def make_payload(endpoint: EndpointSettings, prompt: str | list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Write a chat request; `prompt` is a text, or the blocks of a message."""
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
    Ask until an answer is a valid `model`, each time with another seed: the same request would be answered from the
    cache of requests.
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
    """A request that asks for the shape of its answer: by `response_format`, in the prompt, or by both."""
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
    """From the first brace to the last: some models put words or a code fence around their JSON."""
    begin, end = text.find("{"), text.rfind("}")
    return text[begin : end + 1] if 0 <= begin < end else text


def _what_is_wrong(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place + ': ' if place else ''}{first['msg']}"[:SHOWN]
