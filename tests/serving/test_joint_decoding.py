"""Answers that decode together are those that the model gives alone: on all backbones, joined and left at any time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.helpers.tiny import BACKBONES, Sample, make_inputs, tiny_config, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from fusion_hf.inference import ChatModel
from fusion_hf.serving.chat_requests import Sampling
from fusion_hf.serving.generation import SamplingLogitsProcessor
from fusion_hf.serving.joint_decoding import DecodingRow
from fusion_hf.serving.model_thread import Answer, ModelThread, row_of

SECONDS = 60  # a hung thread fails its test
TOLERANCE = {"rtol": 0.0, "atol": 2e-4}  # of logits of about 10
HALF_HEAD = 4


class Script(LogitsProcessor):
    """Keeps the logits; raises where told to."""

    def __init__(self, fails_at: int | None = None):
        self.logits: list[torch.Tensor] = []
        self.fails_at = fails_at

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(self.logits) == self.fails_at:
            raise KeyError("this one's own fault")
        self.logits.append(scores.clone())
        return scores


class Ignored(BaseStreamer):
    """Takes a prompt and does nothing."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


class Request(Answer):
    """A prompt that asks for a number of tokens; `then` is called with the number of those that were written."""

    def __init__(
        self,
        chat_model: ChatModel,
        sample: Sample,
        tokens: int,
        seed: int | None = None,
        then: Callable[[int], None] = lambda written: None,
        fails_at: int | None = None,
    ):
        super().__init__()
        self.chat_model = chat_model
        self.inputs: Any = make_inputs(chat_model.model.config, [sample])
        self.tokens, self.seed, self.then = tokens, seed, then
        self.script = Script(fails_at)
        self.written: list[int] = []
        self.error: Exception | None = None

    def processors(self) -> LogitsProcessorList:
        draw = [] if self.seed is None else [SamplingLogitsProcessor(Sampling(1.0, seed=self.seed))]
        return LogitsProcessorList([self.script, *draw])

    def alone(self) -> tuple[list[int], torch.Tensor]:
        """Ids and logits `(tokens, V)` that `generate` gives."""
        self.script.logits.clear()
        output = self.chat_model.generate(self.inputs, self.tokens, logits_processor=self.processors())
        logits = torch.cat(self.script.logits)
        self.script.logits.clear()
        return output.sequences[0, self.inputs["input_ids"].shape[1] :].tolist(), logits

    def begin(self) -> DecodingRow:
        return DecodingRow.prepare(self.chat_model, self.inputs, self.tokens, Ignored(), self.processors())

    def take(self, token: int) -> bool:
        self.written.append(token)
        self.then(len(self.written))
        return token == self.chat_model.model.config.text_config.eos_token_id or (
            row_of(self).length == row_of(self).max_length
        )

    @contextmanager
    def catch(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, RuntimeError, ValueError) as error:
            self.error = error


SAMPLES = (
    Sample([6], seed=1),
    Sample([3], image=False, seed=2),
    Sample([8, 3], answers=[4], seed=3),
    Sample([5], seed=4),
    Sample([12], image=False, seed=5),
)


def make_requests(chat_model: ChatModel) -> list[Request]:
    """Long and short answers, two of them drawn; each is sent when the one before has three tokens."""
    tokens, seeds = (16, 24, 5, 12, 8), (None, 7, None, 9, None)
    settings = zip(SAMPLES, tokens, seeds, strict=True)
    return [Request(chat_model, sample, count, seed) for sample, count, seed in settings]


def run(requests: list[Request], most: int = 8) -> list[int]:
    """Answer them, and return the rows of each pass of the model."""
    thread = ModelThread(requests[0].chat_model, most)
    for before, after in pairwise(requests):
        before.then = lambda written, after=after: thread.submit(after) if written == 3 else None
    rows: list[int] = []

    def count(module: Any, given: Any, arguments: dict[str, Any]) -> None:
        rows.append(len(arguments["input_ids"]))

    handle = requests[0].chat_model.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        thread.start()
        thread.submit(requests[0])
        for request in requests:
            request.ended.result(SECONDS)
    finally:
        thread.close()
        handle.remove()
    # nothing is kept of answers that have ended
    assert all(request.row is None for request in requests)
    assert all(group.batch._cache is None and not group.answers for group in thread._groups.values())
    return rows


def check(requests: list[Request], most: int = 8) -> list[int]:
    """Answer them together and alone, compare, and return the rows of each pass together."""
    expected = [request.alone() for request in requests]
    rows = run(requests, most)
    for request, (ids, logits) in zip(requests, expected, strict=True):
        assert request.error is None
        assert request.written == ids
        torch.testing.assert_close(torch.cat(request.script.logits), logits, **TOLERANCE)
    assert sum(rows) == len(requests) + sum(len(ids) - 1 for ids, _ in expected)  # one pass for each prompt and token
    return rows


def load(chat_model: ChatModel, backbone: str, **changes: Any) -> ChatModel:
    return ChatModel(tiny_model(tiny_config(backbone, **changes)), chat_model.processor)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_together_as_alone(chat_model: ChatModel, backbone: str):
    rows = check(make_requests(load(chat_model, backbone)))
    assert max(rows) >= 3


@pytest.mark.parametrize("backbone", ["mistral", "phi3", "qwen2"])
def test_sliding_windows(chat_model: ChatModel, backbone: str):
    """Shorter than all prompts, or than some; in all layers, or in the last ones."""
    for window in (4, 30):
        text = {"sliding_window": window}
        if backbone == "qwen2":
            text |= {"use_sliding_window": True, "max_window_layers": 2}
        assert max(check(make_requests(load(chat_model, backbone, text=text)))) >= 3


def test_long_rope(chat_model: ChatModel):
    """Rows on both sides of the switch never share a pass; whoever crosses it is processed again."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * HALF_HEAD, "long_factor": [9.0] * HALF_HEAD}
    lengths = [make_inputs(tiny_config(), [sample])["input_ids"].shape[1] for sample in SAMPLES]
    text = {
        "rope_parameters": {**factors, "rope_theta": 10000.0},
        "original_max_position_embeddings": lengths[0] + 7,
    }
    model = load(chat_model, "phi3", text=text)
    requests = make_requests(model)
    expected = [request.alone() for request in requests]
    rows = run(requests)
    assert [request.written for request in requests] == [ids for ids, _ in expected]
    assert max(rows) >= 2
    limit = model.short_rope_length
    crossings = [n <= limit < n + len(ids) - 1 for n, (ids, _) in zip(lengths, expected, strict=True)]
    assert True in crossings and False in crossings and max(lengths) > limit
    assert sum(rows) == len(requests) + sum(len(ids) - 1 for ids, _ in expected)


def test_what_fails_together_goes_on_alone(chat_model: ChatModel):
    """Too little memory for three rows: all answers come, by fewer of them at a time."""
    model = load(chat_model, "llama")
    refused: list[int] = []

    def run_out(module: Any, given: Any, output: Any) -> None:  # after the pass: the cache has a place too many
        if len(output.logits) > 2:
            refused.append(len(output.logits))
            raise torch.OutOfMemoryError("CUDA out of memory.")

    requests = make_requests(model)
    expected = [request.alone()[0] for request in requests]
    model.model.register_forward_hook(run_out)
    run(requests)
    assert [request.written for request in requests] == expected
    assert all(request.error is None for request in requests)
    assert refused


def test_own_errors_leave_others_alone(chat_model: ChatModel):
    model = load(chat_model, "llama")
    requests = make_requests(model)
    expected = [request.alone()[0] for request in requests]
    requests[1].script.fails_at = 6
    run(requests)
    assert isinstance(requests[1].error, KeyError) and len(requests[1].written) == 6
    others = [index for index in range(len(requests)) if index != 1]
    assert [requests[index].written for index in others] == [expected[index] for index in others]


def test_room(chat_model: ChatModel):
    """No more rows than allowed, in the order of arrival, and none is left waiting."""
    rows = check(make_requests(load(chat_model, "llama")), most=2)
    assert max(rows) == 2
