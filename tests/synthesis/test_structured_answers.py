"""Structured answers: how their shape is asked for, checked, and asked for again."""

import asyncio
import json
from typing import Any

import pytest
from datatrove.pipeline.inference.types import InferenceError, InferenceResult

from fusion_hf.synthesis.run_config import EndpointSettings
from fusion_hf.synthesis.schemas import SceneDescription
from fusion_hf.synthesis.structured_answers import StructuredAnswer, ask_structured

GOOD = json.dumps({"description": "A red ball."})


class Model:
    """Answers in turn; keeps what it was asked."""

    def __init__(self, *answers: str | Exception, finish: str = "stop"):
        self.answers = list(answers)
        self.payloads: list[dict[str, Any]] = []
        self.finish = finish

    async def __call__(self, payload: dict[str, Any]) -> InferenceResult:
        self.payloads.append(payload)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return InferenceResult(answer, self.finish, {"prompt_tokens": 3, "completion_tokens": 2})


def ask(model: Model, **settings: Any) -> StructuredAnswer:
    endpoint = EndpointSettings("m", "http://localhost:1", tries=3, **settings)
    return asyncio.run(ask_structured(model, endpoint, "Describe it.", SceneDescription, 5))


def test_a_valid_answer():
    model = Model(GOOD)
    made = ask(model, arguments={"top_p": 0.9})
    assert made.answer == SceneDescription(description="A red ball.") and made.seed == 5
    (payload,) = model.payloads
    assert payload["response_format"]["json_schema"]["schema"]["required"] == ["description"]
    assert payload["seed"] == 5 and payload["top_p"] == 0.9
    assert made.usage == {"requests": 1, "prompt_tokens": 3, "completion_tokens": 2}


def test_each_try_has_another_seed():
    model = Model('{"description": ""}', "nonsense", GOOD)
    made = ask(model)
    assert made.answer is not None and made.usage["requests"] == 3
    seeds = [payload["seed"] for payload in model.payloads]
    assert len(set(seeds)) == 3 and made.seed == seeds[-1]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Model("no", "no", "no"), "no valid answer in 3 tries: Invalid JSON"),
        (Model(*['{"descriptions": "x"}'] * 3), "description: Field required"),
        (Model(GOOD, GOOD, GOOD, finish="length"), "longer than 1024 tokens"),
        (Model(InferenceError(None, "HTTP 400: too long")), "refused: HTTP 400: too long"),
    ],
)
def test_what_has_no_valid_answer_has_a_reason(model: Model, reason: str):
    made = ask(model)
    assert made.answer is None and reason in made.reason


@pytest.mark.parametrize("text", [f"Sure!\n```json\n{GOOD}\n```", f"  {GOOD}", GOOD])
def test_the_schema_in_the_prompt(text: str):
    model = Model(text)
    assert ask(model, structured="prompt").answer is not None
    (payload,) = model.payloads
    assert "response_format" not in payload and '"description"' in payload["messages"][0]["content"]


def test_json_without_a_schema():
    model = Model(GOOD)
    ask(model, structured="json_object")
    (payload,) = model.payloads
    assert (
        payload["response_format"] == {"type": "json_object"} and '"description"' in payload["messages"][0]["content"]
    )
