"""The bundled model's answers to easy-vqa in vLLM are those in transformers, to the last one."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.helpers.serving import data_uri, user

from fusion_hf import batch_generate, nano_path
from fusion_hf.data.easy_vqa import read_easy_vqa
from fusion_hf.inference import ChatModel

pytestmark = pytest.mark.vllm
NUM_QUESTIONS = 500
MAX_NEW_TOKENS = 16
QUERY_LEN = 4  # another one than where a request says nothing


class Asked(NamedTuple):
    """An image's question and its answer in the data set."""

    image: Path
    question: str
    answer: str


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    rows = [Asked(image.path, *pair) for image in read_easy_vqa("test") for pair in image.questions]
    rows = rows[:: len(rows) // NUM_QUESTIONS][:NUM_QUESTIONS]
    assert len(rows) == NUM_QUESTIONS
    return rows


def by_transformers(asked: list[Asked], dtype: str = "float32", **options: Any) -> list[str]:
    records = [{"question": row.question, "image": str(row.image)} for row in asked]
    chat_model = ChatModel.load(device="cpu", dtype=dtype)
    results = batch_generate(records, chat_model, max_new_tokens=MAX_NEW_TOKENS, progress=False, **options)
    return [result["answer"] for result in results]


def by_vllm(engine: Any, asked: list[Asked], **arguments: Any) -> list[str]:
    from vllm import SamplingParams

    conversations = [[user(row.question, data_uri(row.image.read_bytes()))] for row in asked]
    settings = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    outputs = engine.chat(conversations, settings, use_tqdm=False, mm_processor_kwargs=arguments or None)
    return [output.outputs[0].text for output in outputs]


def test_five_hundred_questions_of_easy_vqa(load, asked):
    engine = load(nano_path())
    answers, expected = by_vllm(engine, asked), by_transformers(asked)
    differing = [pair for pair in zip(answers, expected, strict=True) if pair[0] != pair[1]]
    assert not differing, differing[:5]
    some = asked[::10]
    assert by_vllm(engine, some, query_len=QUERY_LEN) == by_transformers(some, query_len=QUERY_LEN)
    assert sum(answer == row.answer for answer, row in zip(answers, asked, strict=True)) > 0.99 * NUM_QUESTIONS


def test_half_precision(load, asked):
    """Roundings differ, of which at most one answer in a hundred is another one."""
    answers, expected = by_vllm(load(nano_path(), dtype="bfloat16"), asked), by_transformers(asked, "bfloat16")
    assert sum(answer == other for answer, other in zip(answers, expected, strict=True)) >= 0.99 * NUM_QUESTIONS
    assert sum(answer == row.answer for answer, row in zip(answers, asked, strict=True)) > 0.98 * NUM_QUESTIONS
