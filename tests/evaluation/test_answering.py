"""Answers do not depend on batches or kills, and what fails is no answer."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_hf.common.errors import InputError
from fusion_hf.data.easy_vqa import read_easy_vqa
from fusion_hf.evaluation.answer_cache import AnswerCache
from fusion_hf.evaluation.answering import RequestAnswerer
from fusion_hf.evaluation.local import LocalModel
from fusion_hf.evaluation.prompting import MAX_NEW_TOKENS, Continuation, Generation, Request
from fusion_hf.inference import ChatModel

BEGUN = Path(__file__).parents[1] / "fixtures" / "begun"
OPTIONS = ("red", "blue", "yes", "rectangle")


@pytest.fixture(scope="module")
def one_by_one(chat_model: ChatModel, questions: list[Request]) -> list[Any]:
    return RequestAnswerer(LocalModel(chat_model, batch_size=1)).answer(questions)


def test_one_by_one_is_what_the_assistant_answers(chat_model, questions, one_by_one):
    for request, answer in list(zip(questions, one_by_one, strict=True))[:8]:
        messages = request.read()
        for block in messages[0]["content"]:
            if block["type"] == "image":
                block["image"] = block.pop("url")
        assert chat_model.answer(messages, max_new_tokens=6) == answer["answer"]


def test_batches_answer_as_one_by_one(chat_model, questions, one_by_one):
    assert RequestAnswerer(LocalModel(chat_model, batch_size=16)).answer(questions) == one_by_one


def test_tiles_of_an_image_are_encoded_once(chat_model, questions, monkeypatch):
    encoded = []
    encode_tiles = ChatModel.encode_tiles
    monkeypatch.setattr(
        ChatModel, "encode_tiles", lambda self, p, q: encoded.append(len(p)) or encode_tiles(self, p, q)
    )
    chat_model.image_cache.clear()
    RequestAnswerer(LocalModel(chat_model, batch_size=4)).answer(questions)
    with_image = {request.read()[0]["content"][0]["url"].filename for request in questions if _shows(request)}
    assert sum(encoded) == len(with_image)


def _shows(request: Request) -> bool:
    return request.read()[0]["content"][0]["type"] == "image"


def test_equal_requests_are_asked_once(chat_model, questions):
    answerer = RequestAnswerer(LocalModel(chat_model, batch_size=4))
    answers = answerer.answer([*questions[:3], *questions[:3]])
    assert (answers[:3], answerer.asked) == (answers[3:], 3)


def test_what_was_answered_is_not_asked_again(chat_model, questions, one_by_one, tmp_path: Path):
    first = AnswerCache(tmp_path)
    RequestAnswerer(LocalModel(chat_model), first).answer(questions[:5])
    first.close()
    second = AnswerCache(tmp_path, rank=1)
    answerer = RequestAnswerer(LocalModel(chat_model, batch_size=16), second)
    assert answerer.answer(questions) == one_by_one
    second.close()
    keys = [line["key"] for path in tmp_path.glob("*.jsonl") for line in map(json.loads, path.open())]
    assert len(keys) == len(set(keys)) == answerer.asked + 5


def test_half_a_line_is_dropped_and_asked_again(chat_model, questions, one_by_one, tmp_path: Path):
    cache = AnswerCache(tmp_path)
    RequestAnswerer(LocalModel(chat_model), cache).answer(questions[:5])
    cache.close()
    path = tmp_path / "00000.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    cache = AnswerCache(tmp_path)
    answerer = RequestAnswerer(LocalModel(chat_model), cache)
    assert answerer.answer(questions[:5]) == one_by_one[:5]
    cache.close()
    assert answerer.asked == 1
    assert sorted(json.loads(line)["doc_id"] for line in path.open()) == [0, 1, 2, 3, 4]


@pytest.fixture
def former(chat_model) -> LocalModel:
    """With the identity that the model had when the files in `begun` were made."""
    model = LocalModel(chat_model)
    model.reader = replace(model.reader, identity=(BEGUN / "identity.json").read_text().strip())
    return model


@pytest.fixture
def former_requests(make_request) -> list[Request]:
    first, second = read_easy_vqa("test")[:2]
    texts = [text for text, _ in first.questions][:3]
    return [
        *(make_request(text, first.path, number=number) for number, text in enumerate(texts)),
        make_request(texts[0], first.path, number=3, wanted=Continuation(" red")),
        make_request(second.questions[0][0], second.path, number=9),
    ]


def test_answers_of_the_former_release_are_taken_up(former: LocalModel, former_requests, tmp_path: Path):
    """`begun/answers.jsonl` was written by the code before `ResultLog`; a kill tore its last line."""
    path = tmp_path / "00000.jsonl"
    path.write_bytes(begun := (BEGUN / "answers.jsonl").read_bytes())
    cache = AnswerCache(tmp_path)
    answerer = RequestAnswerer(former, cache)
    answers = answerer.answer(former_requests)
    cache.close()
    assert (answerer.asked, None in answers) == (1, False)
    assert path.read_bytes().startswith(begun)
    assert json.loads(path.read_bytes().splitlines()[-1]).keys() == {"key", "task", "doc_id", "answer"}


def test_answers_are_logged_as_by_the_former_release(former: LocalModel, former_requests, tmp_path: Path):
    cache = AnswerCache(tmp_path)
    RequestAnswerer(former, cache).answer(former_requests[:3])
    cache.close()
    before = (BEGUN / "answers.jsonl").read_bytes().splitlines()[:3]
    assert (tmp_path / "00000.jsonl").read_bytes().splitlines() == before


def test_other_settings_are_other_questions(chat_model, questions, tmp_path: Path):
    cache = AnswerCache(tmp_path)
    RequestAnswerer(LocalModel(chat_model), cache).answer(questions[:2])
    other = RequestAnswerer(LocalModel(chat_model, query_len=4), cache)
    other.answer(questions[:2])
    assert other.asked == 2


def test_a_folder_in_use_is_refused(tmp_path: Path):
    cache = AnswerCache(tmp_path)
    with pytest.raises(InputError, match="in use by another run"):
        AnswerCache(tmp_path)
    cache.close()


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / "00000.jsonl").write_text('{"key": "a", "answer": "b"}\n{"key": "a"}\n')
    with pytest.raises(InputError, match=r"00000\.jsonl: line 2 must contain an answer"):
        AnswerCache(tmp_path)


def test_failures_are_named_and_keep_no_answer_from_the_others(
    chat_model, questions, one_by_one, make_request, tmp_path: Path
):
    first, second = (image.path for image in read_easy_vqa("test")[:2])
    broken = tmp_path / "broken.png"
    broken.write_bytes(first.read_bytes()[:60])
    failing = [
        make_request("which?", first, second, number=101),
        make_request("why? " * chat_model.max_length, first, number=102),
        make_request("what?", broken, number=103),
    ]
    answerer = RequestAnswerer(LocalModel(chat_model, batch_size=16))
    assert answerer.answer([*failing, *questions[:4]]) == [None, None, None, *one_by_one[:4]]
    reasons = {failure.doc_id: failure.reason for failure in answerer.failures}
    assert "SeveralImages: A request must have at most one image, got 2" in reasons[101]
    assert "tokens" in reasons[102]
    assert set(reasons) == {101, 102, 103}


def test_options_are_scored(chat_model, make_request: Callable[..., Request]):
    """Against probabilities of one forward pass per option, without batches, padding or shared tiles."""
    image = read_easy_vqa("test")[0].path
    requests = [
        make_request("what color is the shape?", image, number=number, wanted=Continuation(f" {option}"))
        for number, option in enumerate(OPTIONS)
    ]
    answers = RequestAnswerer(LocalModel(chat_model, batch_size=3)).answer(requests)
    question = [{"role": "user", "content": [{"type": "image", "path": str(image)}, *_text()]}]
    likeliest = chat_model.answer(question, max_new_tokens=6)
    for option, answer in zip(OPTIONS, answers, strict=True):
        assert answer["logprob"] == pytest.approx(_logprob(chat_model, question, option), abs=1e-3)
        assert answer["greedy"] == (option == likeliest)
    assert sum(math.exp(answer["logprob"]) for answer in answers) <= 1


def _text() -> list[dict[str, str]]:
    return [{"type": "text", "text": "what color is the shape?"}]


@torch.no_grad()
def _logprob(chat_model: ChatModel, question: list[dict[str, Any]], option: str) -> float:
    inputs = chat_model.prepare(question)
    begin = inputs["input_ids"].shape[1]
    ids = chat_model.processor.tokenizer(option, add_special_tokens=False, return_tensors="pt")["input_ids"]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = chat_model.model(**inputs).logits[0, begin - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, :, None]).sum().item()


def test_settings_of_a_task():
    assert Generation.of({}) == Generation(MAX_NEW_TOKENS)
    assert Generation.of({"until": ["\n\n"], "do_sample": False, "temperature": 0.2, "top_p": 1.0}) == Generation()
    sampled = Generation.of({"temperature": 0.5, "top_p": 0, "max_new_tokens": 3, "until": "Q:"})
    assert sampled == Generation(3, ("Q:",), 0.5)
    assert sampled.cut(" red Q: and Q:") == "red"
    with pytest.raises(InputError, match=r"`generation_kwargs` must be among .*got 'beams'"):
        Generation.of({"beams": 2})


def test_sampled_answers_are_those_of_their_question(chat_model, make_request):
    request = make_request("what?", wanted=Generation(max_new_tokens=6, temperature=5.0))
    answers = RequestAnswerer(LocalModel(chat_model, batch_size=4)).answer([request] * 4)
    assert len({answer["answer"] for answer in answers}) > 1
    assert RequestAnswerer(LocalModel(chat_model, batch_size=1)).answer([request] * 4) == answers
