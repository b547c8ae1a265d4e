"""Compiled generation's own loop: the ids of `generate`, however far it reads behind the steps."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from tests.helpers.devices import move
from tests.helpers.tiny import BACKBONES, Sample, make_inputs, tiny_config, tiny_model
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

from fusion_hf import CompiledGenerator, FusionForConditionalGeneration
from fusion_hf.inference import decoding
from fusion_hf.model.modeling_fusion_base import cache_keyword

SAMPLES = [Sample([5], seed=1), Sample([4, 7], [3], seed=2), Sample([6], image=False, seed=3)]
NEW_TOKENS = 8
LENGTH = 128
GREEDY = {"do_sample": False}


class Notes(BaseStreamer):
    """What a streamer gets."""

    def __init__(self) -> None:
        self.values: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.values.append([])


def prompts(model: FusionForConditionalGeneration, samples: list[Sample] = SAMPLES) -> dict[str, Any]:
    return make_inputs(model.config, samples, padding_side="left") | {"max_new_tokens": NEW_TOKENS}


def usual(model: FusionForConditionalGeneration, **inputs: Any) -> tuple[torch.Tensor, list[list[int]]]:
    """Ids and stream of transformers' loop."""
    notes = Notes()
    torch.manual_seed(0)
    return model.generate(**inputs, streamer=notes), notes.values


def ahead(model: FusionForConditionalGeneration, **inputs: Any) -> tuple[torch.Tensor, list[list[int]]]:
    """The same of `decode_ahead`."""
    notes = Notes()
    cache = cache_keyword(StaticCache(model.config.text_config, max_cache_len=LENGTH))
    loop = partial(decoding.decode_ahead, streamer=notes)
    torch.manual_seed(0)
    ids = model.generate(**inputs, **cache, disable_compile=True, streamer=notes, custom_generate=loop)
    return ids, notes.values


def check(model: FusionForConditionalGeneration, **inputs: Any) -> None:
    (ids, stream), (expected, expected_stream) = ahead(model, **inputs), usual(model, **inputs)
    assert torch.equal(ids, expected)
    assert stream == expected_stream


def ends(model: FusionForConditionalGeneration, places: tuple[int, ...] = (2, 4, 1)) -> list[int]:
    """Ids at which the rows' greedy answers end, if not before."""
    ids, _ = usual(model, **prompts(model), **GREEDY, eos_token_id=None)
    answers = ids[:, -NEW_TOKENS:].tolist()
    return [row[place] for row, place in zip(answers, places, strict=True)]


@pytest.fixture(params=[0, 1])
def delay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """As on a CPU, and as on a GPU."""
    monkeypatch.setattr(decoding, "delay_of", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("backbone", BACKBONES)
def test_all_backbones(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "delay_of", lambda device: 1)
    model = tiny_model(tiny_config(backbone))
    for eos_token_id in (None, ends(model)):
        check(model, **prompts(model), **GREEDY, eos_token_id=eos_token_id)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 2.0, "top_k": 5},
        GREEDY | {"repetition_penalty": 1.5},
        GREEDY | {"min_new_tokens": 6},
        GREEDY | {"pad_token_id": None},
        GREEDY | {"max_new_tokens": 1},
    ],
    ids=str,
)
def test_options_of_generate(delay: int, options: dict[str, Any]) -> None:
    model = tiny_model(tiny_config())
    check(model, **prompts(model) | {"eos_token_id": ends(model)} | options)


@pytest.mark.parametrize("place", [0, 3, NEW_TOKENS - 2, NEW_TOKENS - 1])
def test_an_answer_ends_at_every_place(delay: int, place: int) -> None:
    """What is computed behind the end is in neither ids nor stream."""
    model = tiny_model(tiny_config())
    inputs = prompts(model, SAMPLES[:1]) | GREEDY
    ids, _ = usual(model, **inputs, eos_token_id=None)
    check(model, **inputs, eos_token_id=int(ids[0, place - NEW_TOKENS]))


def test_compiled_generation_streams(delay: int) -> None:
    model = tiny_model(tiny_config())
    inputs = prompts(model) | GREEDY | {"eos_token_id": ends(model)}
    generator = CompiledGenerator(model, [LENGTH], NEW_TOKENS, len(SAMPLES), backend="eager")
    notes = Notes()
    ids = generator.generate(**inputs, streamer=notes)
    expected, stream = usual(model, **inputs)
    assert torch.equal(ids, expected)
    assert notes.values == stream
    torch._dynamo.reset()


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for_between_steps() -> None:
    """Twice as many steps read nothing more back, while transformers' loop reads after each of them."""
    model = tiny_model(tiny_config()).cuda()
    inputs = prompts(model) | GREEDY | {"eos_token_id": None}
    numbers = {name: value for name, value in inputs.items() if not isinstance(value, torch.Tensor)}
    inputs = move({name: value for name, value in inputs.items() if name not in numbers}, "cuda") | numbers
    counts = []
    for new_tokens in (NEW_TOKENS, 2 * NEW_TOKENS):
        cache = cache_keyword(StaticCache(model.config.text_config, max_cache_len=LENGTH))
        options = inputs | {"max_new_tokens": new_tokens, "disable_compile": True}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model.generate(**options, **cache, custom_generate=decoding.decode_ahead)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing" in str(warning.message) for warning in caught))
    assert counts[0] == counts[1]
