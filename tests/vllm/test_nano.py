"""The bundled model's answers to easy-vqa in vLLM are those in transformers, to the last one."""

import pytest
from tests.helpers.serving import data_uri, user

from fusion_hf import batch_generate, nano_path
from fusion_hf.nano.easy_vqa import read_easy_vqa

pytestmark = pytest.mark.vllm
NUM_QUESTIONS = 500
MAX_NEW_TOKENS = 16
QUERY_LEN = 4  # another one than where a request says nothing


def test_five_hundred_questions_of_easy_vqa(load):
    from vllm import SamplingParams

    rows = [(picture.path, *pair) for picture in read_easy_vqa("test") for pair in picture.questions]
    rows = rows[:: len(rows) // NUM_QUESTIONS][:NUM_QUESTIONS]
    assert len(rows) == NUM_QUESTIONS
    records = [{"question": question, "image": str(path)} for path, question, _ in rows]
    expected = [row["answer"] for row in batch_generate(records, max_new_tokens=MAX_NEW_TOKENS, progress=False)]

    engine = load(nano_path())
    conversations = [[user(question, data_uri(path.read_bytes()))] for path, question, _ in rows]
    settings = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    outputs = engine.chat(conversations, settings, use_tqdm=False)
    answers = [output.outputs[0].text for output in outputs]
    differing = [number for number, pair in enumerate(zip(answers, expected, strict=True)) if pair[0] != pair[1]]
    assert not differing, [(answers[number], expected[number]) for number in differing[:5]]
    some = slice(0, NUM_QUESTIONS, 10)
    closer = engine.chat(conversations[some], settings, use_tqdm=False, mm_processor_kwargs={"query_len": QUERY_LEN})
    expected = batch_generate(records[some], max_new_tokens=MAX_NEW_TOKENS, query_len=QUERY_LEN, progress=False)
    assert [output.outputs[0].text for output in closer] == [row["answer"] for row in expected]
    right = sum(answer == known for answer, (_, _, known) in zip(answers, rows, strict=True))
    assert right > 0.99 * NUM_QUESTIONS
