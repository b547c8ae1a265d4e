"""Batches answer as one by one do, in the records' order, whatever some of the records are like."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.helpers.broken_images import BROKEN, ODD
from tests.helpers.questions import write_questions
from tests.helpers.tiny import tiny_model
from tests.helpers.training_runs import run_config, write_model

from fusion_hf import FusionForConditionalGeneration, FusionProcessor, batch_generate
from fusion_hf.common.errors import InputError
from fusion_hf.inference import ChatModel, Conversation

COUNT = 30
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def nano() -> ChatModel:
    return ChatModel.load(dtype="float32")


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    """Random weights: its answers never end, and depend on every token before."""
    torch.manual_seed(0)
    chat_model = ChatModel.load(str(write_model(tmp_path_factory.mktemp("model"))), dtype="float32")
    return enlarged(chat_model)


def enlarged(chat_model: ChatModel) -> ChatModel:
    with torch.no_grad():
        for parameter in chat_model.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return chat_model


@pytest.fixture(scope="module")
def long_rope(talkative: ChatModel) -> ChatModel:
    """Phi-3, whose positions change once a sequence has over 150 tokens."""
    half_head = 4
    config = run_config(
        talkative.processor.tokenizer,
        "phi3",
        original_max_position_embeddings=150,
        rope_parameters={
            "rope_type": "longrope",
            "short_factor": [1.0] * half_head,
            "long_factor": [9.0] * half_head,
            "rope_theta": 10000.0,
        },
    )
    model = tiny_model(config, seed=1, scale=1.0)
    return enlarged(ChatModel(model, talkative.processor))


def one_by_one(chat_model: ChatModel, folder: Path, records: list[dict], **settings: Any) -> list[dict]:
    results = []
    for index, record in enumerate(records):
        messages = record.get("messages") or [{"role": "user", "content": record["question"]}]
        messages = [dict(message) for message in messages]
        if "image" in record:
            block = {"type": "image", "image": chat_model.open_image(str(folder / record["image"]))}
            messages[0]["content"] = [block, {"type": "text", "text": messages[0]["content"]}]
        results.append({"id": record.get("id", index), "answer": chat_model.answer(messages, **settings)})
    return results


@pytest.mark.parametrize("name", ["nano", "talkative", "long_rope"])
@pytest.mark.parametrize("budget", [{}, {"query_len": 4}, {"image_token_grid": 3}], ids=str)
def test_equals_one_by_one(request: pytest.FixtureRequest, name: str, budget: dict[str, int], tmp_path: Path):
    chat_model = request.getfixturevalue(name)
    path, records = write_questions(tmp_path, COUNT)
    settings = {"max_new_tokens": NEW_TOKENS, **budget}
    expected = one_by_one(chat_model, tmp_path, records, **settings)
    assert len({result["answer"] for result in expected}) > 5
    assert batch_generate(path, chat_model, batch_size=7, progress=False, **settings) == expected


def test_answers_that_reach_the_maximum(talkative: ChatModel, tmp_path: Path):
    """One of them ends where the model does; the others do not end there with it."""
    path, records = write_questions(tmp_path, 6)
    records[3]["question"] = "why? " * 198
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    expected = one_by_one(talkative, tmp_path, records, max_new_tokens=NEW_TOKENS)
    lengths = [len(talkative.processor.tokenizer(result["answer"])["input_ids"]) for result in expected]
    assert lengths[3] < min(lengths[:3])
    assert batch_generate(path, talkative, max_new_tokens=NEW_TOKENS, progress=False) == expected


@pytest.fixture
def batches(nano: ChatModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Rows and columns of the prompts that nano is given, in order."""
    shapes: list[tuple[int, int]] = []
    generate = FusionForConditionalGeneration.generate

    def noting(self: Any, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        shapes.append((input_ids.shape[0], input_ids.shape[1]))
        return generate(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(FusionForConditionalGeneration, "generate", noting)
    yield shapes


def test_batches_are_of_similar_lengths_and_the_longest_comes_first(nano: ChatModel, batches: list, tmp_path: Path):
    path, _ = write_questions(tmp_path, COUNT)
    batch_generate(path, nano, batch_size=8, max_new_tokens=2, progress=False)
    rows, columns = zip(*batches, strict=True)
    assert rows == (8, 8, 8, 6)
    assert list(columns) == sorted(columns, reverse=True)
    batches.clear()
    batch_generate(path, nano, batch_size=1, max_new_tokens=2, progress=False)
    tokens = sum(columns for _, columns in batches)
    assert sum(r * c for r, c in zip(rows, columns, strict=True)) < 1.15 * tokens


def test_too_large_batches_are_halved(nano: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, _ = write_questions(tmp_path, COUNT)
    expected = batch_generate(path, nano, batch_size=1, max_new_tokens=4, progress=False)
    generate, rows = FusionForConditionalGeneration.generate, []

    def limited(self: Any, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        rows.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return generate(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(FusionForConditionalGeneration, "generate", limited)
    assert batch_generate(path, nano, batch_size=8, max_new_tokens=4, progress=False) == expected
    assert rows[:3] == [8, 4, 2]
    assert max(rows[3:]) == 2  # what was too large once is not tried again


def test_one_prompt_that_is_too_large(nano: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, _ = write_questions(tmp_path, 3)

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(FusionForConditionalGeneration, "generate", fail)
    results = batch_generate(path, nano, progress=False)
    assert all("out of memory" in result["error"] for result in results)


def test_broken_records_are_reported_in_their_places(nano: ChatModel, tmp_path: Path):
    path, records = write_questions(tmp_path, 6)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    question = records[0]["question"]
    broken: list[tuple[Any, str]] = [
        (
            {"id": "missing", "image": "nowhere.png", "question": question},
            "http(s) URL, got 'nowhere.png'",
        ),
        (
            {"id": "folder", "image": "folder.png", "question": question},
            "http(s) URL, got 'folder.png'",
        ),
        ({"id": "long", "image": "x" * 5000, "question": question}, "xxx"),
        ({"id": "null", "image": "a\0b", "question": question}, "must be an existing file"),
        ({"id": "truncated", "image": "truncated.png", "question": question}, "cannot be decoded"),
        ({"id": "text", "image": "text.png", "question": question}, "cannot be opened"),
        ({"id": "data", "image": "data:image/png;base64,AAAA", "question": question}, "cannot be decoded"),
        ({"id": "address", "image": "https://\u0000", "question": question}, "is not a valid URL"),
        ({"id": "unreachable", "image": "http://127.0.0.1:9/a.png", "question": question}, "cannot be opened"),
        ({"id": "empty", "question": " \n"}, "the question is empty"),
        ({"id": "none"}, "exactly one of question, messages, conversations, got none"),
        (
            {"id": "both", "question": question, "messages": []},
            "got question and messages",
        ),
        ({"id": "number", "question": 3}, "`question` must be text, got int"),
        ({"id": "mark", "question": "what is in <image>?"}, "mark without image"),
        ({"id": "two", "images": ["0.png", "1.png"], "question": question}, "several images"),
        (
            {"id": "answered", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "a",
        ),
        ({"id": "endless", "question": "why? " * 2000}, "must have at most 1024 tokens"),
        ({"id": [1], "question": question}, "`id` must be text or a whole number, got list"),
        (b'{"id": "cut", "ques', "line 38: unreadable"),
        (b"[1, 2]", "must be a JSON object, got list"),
        (b"\xff\xfe", "not valid UTF-8"),
    ]
    lines = []
    for index, (record, _) in enumerate(broken):
        good = {**records[index % len(records)], "id": f"good-{index}"}
        lines += [json.dumps(good).encode(), record if isinstance(record, bytes) else json.dumps(record).encode()]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n\n")

    results = batch_generate(path, nano, max_new_tokens=8, progress=False)

    assert len(results) == len(lines)
    expected = one_by_one(nano, tmp_path, records, max_new_tokens=8)
    for index, (record, part) in enumerate(broken):
        good, bad = results[2 * index : 2 * index + 2]
        assert good == {"id": f"good-{index}", "answer": expected[index % len(records)]["answer"]}
        assert set(bad) == {"id", "error"}
        assert part in bad["error"], bad
        identity = record["id"] if isinstance(record, dict) else 2 * index + 1
        assert bad["id"] == (2 * index + 1 if isinstance(identity, list) else identity)


@pytest.mark.filterwarnings("ignore")
def test_images_from_strangers(nano: ChatModel, tmp_path: Path):
    """A broken one is its record's error, as a file and in memory, and all other records are answered."""
    files = {f"{number}.png": content for number, content in enumerate(BROKEN.values())} | ODD
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    path, output = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"id": name, "image": name, "question": "what?"}) + "\n" for name in files))
    results = batch_generate(path, nano, output, batch_size=4, max_new_tokens=2, progress=False)
    assert [result["id"] for result in results] == list(files)
    assert ["answer" in result for result in results] == [name in ODD for name in files]
    assert [json.loads(line) for line in output.read_text().splitlines()] == results

    images = []
    for name in files:
        with contextlib.suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            images.append((name, Image.open(tmp_path / name)))
    records = [{"image": image, "question": "what?"} for _, image in images]
    results = batch_generate(records, nano, batch_size=4, max_new_tokens=2, progress=False)
    assert ["answer" in result for result in results] == [name in ODD for name, _ in images]


def test_records_in_memory(nano: ChatModel, tmp_path: Path):
    """Images of PIL, where a record may have one; a broken one is an error of its own."""
    write_questions(tmp_path, 1)
    image, question = Image.open(tmp_path / "0.png"), "what color is the shape?"
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    block = {"type": "image", "image": image}
    records = [
        {"image": image, "question": question},
        {"messages": [{"role": "user", "content": [block, {"type": "text", "text": question}]}]},
        {"image": str(tmp_path / "0.png"), "conversations": [{"from": "human", "value": f"<image>\n{question}"}]},
        {"image": Image.open(tmp_path / "truncated.png"), "question": question},
        {"question": question},
        "what color is the shape?",
    ]
    output = tmp_path / "answers.jsonl"
    results = batch_generate(records, nano, output, max_new_tokens=8, progress=False)
    expected = Conversation(nano, nano.open_image(image), 8).ask(question)
    assert [result.get("answer") for result in results[:4]] == [expected] * 3 + [None]
    assert "cannot be decoded" in results[3]["error"]
    assert "must be a JSON object, got str" in results[5]["error"]
    assert [json.loads(line) for line in output.read_text().splitlines()] == results
    assert batch_generate([], nano) == []


def test_images_are_opened_when_their_batch_is_up(nano: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, _ = write_questions(tmp_path, COUNT)
    events: list[str] = []
    open_image, generate = ChatModel.open_image, FusionForConditionalGeneration.generate
    monkeypatch.setattr(ChatModel, "open_image", lambda *a: events.append("open") or open_image(*a))
    monkeypatch.setattr(
        FusionForConditionalGeneration, "generate", lambda *a, **k: events.append("generate") or generate(*a, **k)
    )
    batch_generate(path, nano, batch_size=4, max_new_tokens=1, progress=False)
    longest = max(len(part) for part in " ".join(events).replace("generate", "|").split("|"))
    assert longest <= len(" open" * 4) + 1
    assert 0 < events.count("open") <= COUNT * 2 // 3  # an image of several questions of a batch once


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"batch_size": 0}, "batch_size.*at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens.*at least 1, got 0"),
        ({"query_len": 5}, "query_len.*perfect square.*got 5"),
        ({"image_token_grid": 7}, "image_token_grid.*a whole number from 1 to 6.*got 7"),
        ({"device": "cpu"}, "device.*got 'cpu'"),
    ],
)
def test_wrong_arguments(nano: ChatModel, settings: dict[str, Any], part: str):
    with pytest.raises(InputError, match=part):
        batch_generate([{"question": "what?"}], nano, **settings)


def test_processor_does_not_change(nano: ChatModel, tmp_path: Path):
    """Rows are padded on the left even by a tokenizer that pads on the right."""
    path, records = write_questions(tmp_path, 8)
    processor = FusionProcessor.from_pretrained(nano.processor.tokenizer.name_or_path)
    processor.tokenizer.padding_side = "right"
    other = ChatModel(nano.model, processor)
    expected = one_by_one(nano, tmp_path, records, max_new_tokens=8)
    assert batch_generate(path, other, max_new_tokens=8, progress=False) == expected
    assert processor.tokenizer.padding_side == "right"
