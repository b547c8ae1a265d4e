"""On a GPU: the CPU's numbers, from every attention implementation, compiled or not; answers of the bundled model."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from tests.helpers.devices import move
from tests.helpers.tiny import BACKBONES, Sample, make_inputs, tiny_config, tiny_model
from torch._dynamo.utils import counters
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from fusion_hf import CompiledGenerator, FusionConfig, FusionForConditionalGeneration
from fusion_hf.inference import nano_path
from fusion_hf.nano.evaluate import generate_answers
from fusion_hf.nano.training_records import test_records as held_out_records

pytestmark = pytest.mark.gpu

SAMPLES = [Sample([5], seed=1), Sample([4, 7], [3], seed=2), Sample([6], image=False, seed=3)]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
PROMPT_LENGTH = 64
# relative errors of all logits: of one function in float32, and of rounding to half the bits
EXACT, ROUNDED = 1e-5, 0.05
QUESTIONS = 1000
ACCURACY = 0.995


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """cuDNN rounds float32 to fewer bits by itself."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def wide_config() -> FusionConfig:
    """Heads of 16 values in both parts, the fewest that flex attention's kernels take on CUDA."""
    return tiny_config(text={"hidden_size": 64}, vision={"hidden_size": 64})


def batch(model: FusionForConditionalGeneration, samples: list[Sample] = SAMPLES, side: str = "left") -> Any:
    inputs = make_inputs(model.config, samples, padding_side=side)
    query_len = inputs.pop("query_len")
    return move(inputs, model.device.type) | {"query_len": query_len}


def logits_of(model: FusionForConditionalGeneration, side: str = "left") -> torch.Tensor:
    inputs = batch(model, side=side)
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()].float().cpu()


def error(values: torch.Tensor, expected: torch.Tensor) -> float:
    return ((values - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_numbers_of_a_cpu(backbone: str) -> None:
    model = tiny_model(tiny_config(backbone))
    expected = {side: logits_of(model, side) for side in ("left", "right")}
    tokens = model.generate(**batch(model), **GREEDY)
    model.to("cuda")
    for side, logits in expected.items():
        assert error(logits_of(model, side), logits) < EXACT, side
    torch.testing.assert_close(model.generate(**batch(model), **GREEDY).cpu(), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", list(product(("eager", "sdpa", "flex_attention"), repeat=2)))
def test_all_attention_implementations_agree(names: tuple[str, str], dtype: torch.dtype) -> None:
    model = tiny_model(wide_config())
    expected = logits_of(model)
    model.to("cuda", dtype)
    model.set_attn_implementation({"vision_config": names[0], "text_config": names[1]})
    # the kernels that flex attention compiles multiply in TF32
    allowed = ROUNDED if dtype != torch.float32 or "flex_attention" in names else EXACT
    assert error(logits_of(model), expected) < allowed


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("compile_prompt", [False, True])
def test_compiled_generation(compile_prompt: bool, mode: str) -> None:
    """Several calls, so that CUDA graphs are recorded and replayed; the results of earlier calls stay as they were."""
    model = tiny_model(tiny_config()).to("cuda")
    generator = CompiledGenerator(model, [PROMPT_LENGTH], 8, 2, compile_prompt, mode=mode)
    prompts = [SAMPLES[:2], SAMPLES[1:], SAMPLES[:1], SAMPLES[:2]]
    inputs = [batch(model, samples) for samples in prompts]
    results = [generator.generate(**given, **GREEDY) for given in inputs]
    for given, result in zip(inputs, results, strict=True):
        torch.testing.assert_close(result, model.generate(**given, **GREEDY))


def test_static_cache_compiles_by_itself() -> None:
    model = tiny_model(tiny_config()).to("cuda")
    expected = model.generate(**batch(model), **GREEDY)
    static = model.generate(**batch(model), **GREEDY, cache_implementation="static")
    torch.testing.assert_close(static, expected)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_answers_of_the_bundled_model(dtype: torch.dtype) -> None:
    model = AutoModelForImageTextToText.from_pretrained(nano_path(), dtype=dtype, device_map="cuda")
    records = held_out_records()[:QUESTIONS]
    answers = generate_answers(model, AutoProcessor.from_pretrained(nano_path()), records)
    right = [answer == record.turns[0][1] for answer, record in zip(answers, records, strict=True)]
    assert sum(right) / len(right) > ACCURACY


def test_pipeline() -> None:
    record = held_out_records()[0]
    content = [{"type": "image", "image": record.open_image()}, {"type": "text", "text": record.turns[0][0]}]
    ask = pipeline("image-text-to-text", nano_path(), device=0)
    assert ask.model.device.type == "cuda"
    answer = ask(text=[{"role": "user", "content": content}], max_new_tokens=6, return_full_text=False)
    assert answer[0]["generated_text"].strip() == record.turns[0][1]
