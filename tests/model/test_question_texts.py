"""Questions of many languages and scripts are found in the ids as the processor tokenizes them on their own."""

import random
from typing import Any

import pytest
import torch
from PIL import Image
from tests.helpers.chat_models import MODEL_PARAMETERS, chat, encode, make_chat_model
from tests.helpers.question_texts import question_texts

from fusion_hf.model.turns_fusion import find_prompt_ends, find_questions

SAMPLE, ALL = 200, 1015
UNLIMITED = 10**6
IMAGE = Image.new("RGB", (8, 8))
# Phi-3's tokenizer writes a blank as this character, so that ids do not tell at a text's edge which one it was
LOW_LINE = "\u2581"
PLACES = ("alone", "answered", "system", "several", "later")


@pytest.fixture(scope="module", params=MODEL_PARAMETERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Any, Any]:
    model, processor = make_chat_model(request.param, tmp_path_factory.mktemp(request.param))
    processor.tokenizer.model_max_length = UNLIMITED
    return model, processor


def converse(place: str, text: str, others: list[str]) -> list[dict[str, Any]]:
    """A conversation about an image with a text as one of its questions."""
    if place == "several":
        return chat(text, "yes", others[0], "no", others[1], image=IMAGE)
    if place == "later":  # the image stands in the last message
        messages = chat("hello", "yes", text, image=None)
        messages[2]["content"].insert(0, {"type": "image", "image": IMAGE})
        return messages
    answer = [others[0]] if place == "answered" else []
    return chat(text, *answer, image=IMAGE, system=others[1] if place == "system" else None)


def is_known(texts: list[str], chat_format: str) -> bool:
    return chat_format != "phi3" or not any(text.strip() != text.strip().strip(LOW_LINE) for text in texts)


def compare(model: Any, processor: Any, texts: list[str], places: tuple[str, ...]) -> None:
    for number, text in enumerate(texts):
        for place in places:
            others = [texts[number - 1], texts[number - 2]]
            messages = converse(place, text, others)
            inputs = encode(processor, messages, add_generation_prompt=messages[-1]["role"] == "user")
            given = (inputs["input_ids"], inputs["attention_mask"], model.config)
            assert torch.equal(find_prompt_ends(*given), inputs["prompt_end_positions"]), (place, text)
            if is_known([text, *others] if place == "several" else [text], processor.chat_format):
                question, mask = find_questions(*given)
                assert question.tolist() == inputs["instruct_input_ids"].tolist(), (place, text)
                assert mask.tolist() == inputs["instruct_attention_mask"].tolist(), (place, text)


def test_questions_in_a_sample_of_texts(pair) -> None:
    texts = question_texts(ALL)
    compare(*pair, random.Random(1).sample(texts, SAMPLE), ("alone", "several"))


@pytest.mark.slow
def test_questions_in_all_texts(pair) -> None:
    compare(*pair, question_texts(ALL), PLACES)


@pytest.mark.slow
def test_batches_that_were_padded_reordered_or_cut(pair) -> None:
    """Ids alone tell turns and questions, however a batch was put together."""
    model, processor = pair
    texts = [text for text in question_texts(SAMPLE) if LOW_LINE not in text]
    draw = random.Random(2)
    for number in range(0, len(texts) - 4, 4):
        drawn = [converse(draw.choice(("alone", "several", "later")), text, texts[:2]) for text in texts[number:][:4]]
        rows = [encode(processor, messages) for messages in drawn]
        draw.shuffle(rows)
        longest = max(row["input_ids"].shape[1] for row in rows)
        for row in rows:
            missing = longest - row["input_ids"].shape[1]
            left = draw.randint(0, missing)
            ids = torch.nn.functional.pad(row["input_ids"], (left, missing - left), value=draw.randint(0, 5))
            mask = torch.nn.functional.pad(row["attention_mask"], (left, missing - left))
            assert torch.equal(find_prompt_ends(ids, mask, model.config), row["prompt_end_positions"] + left)
            assert torch.equal(find_questions(ids, mask, model.config)[0], row["instruct_input_ids"])
            assert torch.equal(find_questions(ids, None, model.config)[0], row["instruct_input_ids"])


def test_a_question_that_was_cut_off_is_refused(pair) -> None:
    model, processor = pair
    inputs = encode(processor, chat("what color is it?", "red", "and what else is to be seen?", image=IMAGE))
    ends = inputs["prompt_end_positions"][0]
    cut = inputs["input_ids"][:, : int(ends[1]) - 4]
    # the first turn is known, and the second has no header yet
    assert find_prompt_ends(cut, None, model.config).tolist() == [[int(ends[0]), -1]]
    with pytest.raises(ValueError, match=r"Sample 0 has an image.* truncated.*`instruct_input_ids`"):
        find_questions(cut, None, model.config)


@torch.no_grad()
def test_texts_that_the_template_does_not_write_are_refused(pair) -> None:
    """A text before the image belongs to the question, and ids do not say where it begins."""
    model, processor = pair
    inputs = dict(processor(images=[IMAGE], text=["say <image><latent_image>what"], return_tensors="pt"))
    written = {name: value for name, value in inputs.items() if not name.startswith("instruct")}
    with pytest.raises(ValueError, match=r"`instruct_input_ids` cannot be found"):
        model(**written)
    without_header = {name: value for name, value in inputs.items() if name != "prompt_end_positions"}
    with pytest.raises(ValueError, match=r"no assistant header.*`prompt_end_positions`"):
        model(**without_header)
