"""Collator, processor, templates and what the model finds in ids give the authors' sequence, wherever the image is."""

import random
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.helpers.authors_sequence import IMAGE, LATENT, LAYOUTS, Sequence, make_sequence
from tests.helpers.chat_models import FORMAT_PARAMETERS, load_chat_model, write_chat_model
from transformers import DynamicCache

from fusion_hf import FusionForConditionalGeneration, FusionProcessor
from fusion_hf.data.record_parsing import parse_record
from fusion_hf.inference import ChatModel
from fusion_hf.inference.question_files import Entry, parse_question
from fusion_hf.model.modeling_fusion_base import cache_keyword
from fusion_hf.model.turns_fusion import find_prompt_ends, find_questions
from fusion_hf.training import FusionDataCollator

QUERY_LEN = 4
TEAL = Image.new("RGB", (40, 30), "teal")
CALL = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "query_len": QUERY_LEN}
TEXTS = (
    "What is this?",
    " Why?\n",
    "\n\nIs it red?",
    "x",
    "",
    "  ",
    "¿Seguro?",
    "这是什么?",
    "two\n\nlines \t",
    "don't",
)
MARKED = (
    "<image>",
    "<image>\n",
    "\n<image>",
    "<image>\n{}",
    "{}\n<image>",
    " <image> {} ",
    "{}<image>{}",
    "<image>{}<image>",
)
ANSWERS = ("Red.", "a man\nrides", "Sí — 狗 🐕", "B")
Turns = list[tuple[str, str]]
Model = FusionForConditionalGeneration


@pytest.fixture(scope="module", params=FORMAT_PARAMETERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Model, FusionProcessor]:
    return load_chat_model(write_chat_model(tmp_path_factory.mktemp(request.param) / "model", request.param))


def make_turns(rng: random.Random, questions: int, marked: set[int]) -> Turns:
    turns = []
    for number in range(questions):
        text = rng.choice(TEXTS)
        if number in marked:
            text = rng.choice(MARKED).replace("{}", text)
        turns += [("human", text), ("gpt", rng.choice(ANSWERS))]
    return turns


def conversations(most_marks: int) -> list[Turns]:
    """One to four questions; the image's mark in none, in one of them, or in several."""
    rng = random.Random(0)
    made = []
    for _ in range(4):
        for questions in range(1, 5):
            made.append(make_turns(rng, questions, set()))
            made += [make_turns(rng, questions, {place}) for place in range(questions)]
            if most_marks > 1 and questions > 1:
                made.append(make_turns(rng, questions, set(rng.sample(range(questions), 2))))
    return made


def has_mark(turns: Turns) -> bool:
    return any("<image>" in text for _, text in turns)


def expected_of(pair: tuple[Model, FusionProcessor], turns: Turns, add_header: bool = False) -> Sequence:
    processor = pair[1]
    backend = processor.tokenizer.backend_tokenizer
    return make_sequence(LAYOUTS[processor.chat_format], turns, backend, has_mark(turns), add_header)


def collapse(values: list[Any], ids: list[int], processor: FusionProcessor) -> list[Any]:
    """Values with one number for each block."""
    marks = {processor.image_token_id: IMAGE, processor.latent_token_id: LATENT}
    collapsed = []
    for number, group in groupby(zip(ids, values, strict=True), key=lambda item: item[0]):
        if number in marks:
            assert len(list(group)) == (processor.num_image_tokens if marks[number] == IMAGE else QUERY_LEN)
            collapsed.append(marks[number])
        else:
            collapsed += [value for _, value in group]
    return collapsed


def check(inputs: Any, row: int, expected: Sequence, processor: FusionProcessor, has_image: bool) -> None:
    """Ids, prompt ends and question of one row are the authors'."""
    kept = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row][kept].tolist()
    assert collapse(ids, ids, processor) == expected.ids
    shift = int(kept.long().argmax())
    ends = {end - shift for end in inputs["prompt_end_positions"][row].tolist() if end >= 0}
    is_end = collapse([number in ends for number in range(len(ids))], ids, processor)
    assert [number for number, flag in enumerate(is_end) if flag is True] == expected.prompt_ends
    question = inputs["instruct_input_ids"][row][inputs["instruct_attention_mask"][row].bool()].tolist()
    assert question == (processor.tokenizer(expected.question)["input_ids"] if has_image else [])


def to_messages(turns: Turns) -> list[dict[str, Any]]:
    messages = []
    for speaker, text in turns:
        content: Any = text
        if "<image>" in text:
            content = [{"type": "image", "image": TEAL}, {"type": "text", "text": text.replace("<image>", "")}]
        messages.append({"role": "user" if speaker == "human" else "assistant", "content": content})
    return messages


def test_the_collator(pair: tuple[Model, FusionProcessor]) -> None:
    processor = pair[1]
    all_turns = conversations(most_marks=2)
    records = [
        {"image": TEAL if has_mark(turns) else None, "conversations": [{"from": s, "value": t} for s, t in turns]}
        for turns in all_turns
    ]
    collate = FusionDataCollator(processor, query_lens=[QUERY_LEN])
    batch = collate(records)
    read = [parse_record(record | {"image": "a.png" if record["image"] else None}, 0) for record in records]
    again = collate([{"image": r["image"], "messages": new.messages} for r, new in zip(records, read, strict=True)])
    for name, value in batch.items():
        assert torch.equal(torch.as_tensor(again[name]), torch.as_tensor(value)), name
    for row, turns in enumerate(all_turns):
        expected = expected_of(pair, turns)
        check(batch, row, expected, processor, has_mark(turns))
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        labelled = (batch["labels"][row][: len(ids)] != -100).tolist()
        assert [flag is True for flag in collapse(labelled, ids, processor)] == expected.labels


@pytest.mark.parametrize("add_header", [False, True])
def test_the_processor(pair: tuple[Model, FusionProcessor], add_header: bool) -> None:
    model, processor = pair
    for turns in conversations(most_marks=1):
        turns = turns[:-1] if add_header else turns
        expected, messages = expected_of(pair, turns, add_header), to_messages(turns)
        options = {**CALL, "add_generation_prompt": add_header}
        inputs = processor.apply_chat_template(messages, **options)
        check(inputs, 0, expected, processor, has_mark(turns))
        # the same from text, of the processor's template and of the tokenizer's own
        texts = [processor.apply_chat_template(messages, **{**options, "tokenize": False})]
        texts.append(
            processor.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_header, query_len=QUERY_LEN
            )
        )
        assert texts[0] == texts[1]
        again = processor(
            text=texts[0], images=TEAL if has_mark(turns) else None, query_len=QUERY_LEN, return_tensors="pt"
        )
        for name, value in inputs.items():
            assert torch.equal(again[name], value), name
        # and from ids alone
        given = (inputs["input_ids"], inputs["attention_mask"], model.config)
        assert torch.equal(find_prompt_ends(*given), inputs["prompt_end_positions"])
        assert find_questions(*given)[0].tolist() == inputs["instruct_input_ids"].tolist()


def test_questions_of_a_file_and_a_server(pair: tuple[Model, FusionProcessor]) -> None:
    model, processor = pair
    chat_model = ChatModel(model, processor)
    for turns in conversations(most_marks=2):
        turns = turns[:-1]
        record = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
        if not turns[-1][1].replace("<image>", "").strip():
            continue  # such files are asked nothing
        question = parse_question(Entry(record | ({"image": "a.png"} if has_mark(turns) else {}), None), 0)
        messages = question.with_image({"type": "image", "image": TEAL} if has_mark(turns) else None)
        seen = chat_model.encode_image(TEAL) if has_mark(turns) else None
        inputs = chat_model.prepare(messages, QUERY_LEN, seen)
        check(inputs, 0, expected_of(pair, turns, add_header=True), processor, has_mark(turns))


@torch.no_grad()
def test_the_model_takes_an_image_in_a_later_turn(pair: tuple[Model, FusionProcessor], tmp_path: Path) -> None:
    """Alone, in a padded batch, from ids alone, cut at any place, and in generation."""
    model, processor = pair
    turns = [("human", "hello"), ("gpt", "hi"), ("human", "<image>\nwhat is it?"), ("gpt", "red"), ("human", "why?")]
    messages = [to_messages(turns), to_messages([("human", "<image>\nwhat?")]), to_messages(turns[:1])]
    options = {**CALL, "add_generation_prompt": True}
    rows = [processor.apply_chat_template(chat, **options) for chat in messages]
    batch = processor.apply_chat_template(messages, **options, processor_kwargs={"padding_side": "left"})
    logits = model(**batch, query_len=QUERY_LEN).logits
    for number, row in enumerate(rows):
        alone = model(**row, query_len=QUERY_LEN).logits
        torch.testing.assert_close(logits[number, -alone.shape[1] :], alone[0], rtol=1e-4, atol=1e-4)
        names = ("input_ids", "attention_mask", "pixel_values")
        bare = model(**{name: row[name] for name in names if name in row}, query_len=QUERY_LEN).logits
        torch.testing.assert_close(bare, alone)
    # the second turn's first latent block is refined for the first question
    ends = rows[0]["prompt_end_positions"].clone()
    ends[0, 0] -= 1
    with pytest.raises(ValueError, match="prompt_end_positions"):
        model(**{**rows[0], "prompt_end_positions": ends}, query_len=QUERY_LEN)
    without = model(**{**rows[0], "prompt_end_positions": ends[:, :0]}, query_len=QUERY_LEN).logits
    assert (without - model(**rows[0], query_len=QUERY_LEN).logits).abs().max() > 1e-4
    written = model.generate(**rows[0], query_len=QUERY_LEN, max_new_tokens=3, do_sample=False)
    uncached = model.generate(**rows[0], query_len=QUERY_LEN, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(written, uncached)
    # a cache that ends between a turn and its latent block cannot be continued
    cache = DynamicCache(config=model.config.text_config)
    ids = rows[0]["input_ids"]
    border = int((ids == processor.latent_token_id).nonzero()[0, 1]) - 2
    begun = {**rows[0], "input_ids": ids[:, :border], "attention_mask": rows[0]["attention_mask"][:, :border]}
    features = model.get_global_features(rows[0]["pixel_values"])
    model(**{**begun, "prompt_end_positions": ids[:, :0]}, query_len=QUERY_LEN, **cache_keyword(cache), use_cache=True)
    with pytest.raises(ValueError, match="0 latent blocks but the ends of 1 turns"):
        model.generate(
            **{**rows[0], "global_features": features}, **cache_keyword(cache), query_len=QUERY_LEN, max_new_tokens=1
        )
    record = {"image": TEAL, "conversations": [{"from": s, "value": t} for s, t in [*turns, ("gpt", "so")]]}
    whole = FusionDataCollator(processor, query_lens=[QUERY_LEN])([record])
    first = int((whole["input_ids"][0] == processor.image_token_id).nonzero()[-1])
    for length in range(first + 1, whole["input_ids"].shape[1] + 1, 7):
        cut = FusionDataCollator(processor, query_lens=[QUERY_LEN], max_length=length)([record])
        assert torch.equal(cut["input_ids"], whole["input_ids"][:, :length])
        assert torch.isfinite(model(**{name: value for name, value in cut.items() if name != "labels"}).logits).all()
