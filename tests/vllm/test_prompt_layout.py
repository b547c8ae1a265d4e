"""What is found in a prompt's ids; needs no vLLM."""

import numpy as np
import pytest
from PIL import Image

from fusion_hf import FusionConfig, FusionProcessor, nano_path
from fusion_hf.inference import question_message
from fusion_hf.vllm.prompt_layout import PromptParser, request_budget

CONFIG = FusionConfig.from_pretrained(nano_path())
PROCESSOR = FusionProcessor.from_pretrained(nano_path())
READER = PromptParser.of(CONFIG, PROCESSOR)


def conversation(turns: int, has_image: bool, place: int = 0) -> list[dict]:
    messages = [{"role": "system", "content": "one word"}]
    for turn in range(turns):
        image = Image.new("RGB", (8, 8)) if has_image and turn == place else None
        messages += [
            question_message(f"question {turn}?", image),
            {"role": "assistant", "content": f"answer {turn}"},
        ]
    return messages[:-1]


@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("query_len", [4, 16])
def test_the_turns_of_a_prompt_are_those_of_the_processor(turns, has_image, query_len):
    inputs = PROCESSOR.apply_chat_template(
        conversation(turns, has_image),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        query_len=query_len,
    )
    ids = inputs["input_ids"][0]
    found = READER.read(ids)
    assert found.num_image_tokens == (CONFIG.num_image_tokens if has_image else 0)
    assert found.query_len == query_len
    starts = np.flatnonzero(np.array(ids) == CONFIG.latent_token_id).reshape(turns, query_len)
    np.testing.assert_array_equal(found.latent_positions, starts)
    np.testing.assert_array_equal(found.prompt_end_positions, inputs["prompt_end_positions"][0])
    found.check(request_budget(CONFIG, query_len))


@pytest.mark.parametrize("place", [1, 2])
def test_an_image_in_a_later_turn(place):
    """A latent block may be behind its turn's end."""
    ids, ends = (
        PROCESSOR.apply_chat_template(
            conversation(3, True, place), add_generation_prompt=True, tokenize=True, return_dict=True
        )[name][0]
        for name in ("input_ids", "prompt_end_positions")
    )
    found = READER.read(ids)
    starts = np.flatnonzero(np.array(ids) == CONFIG.latent_token_id).reshape(3, CONFIG.query_len)
    np.testing.assert_array_equal(found.latent_positions, starts)
    np.testing.assert_array_equal(found.prompt_end_positions, ends)
    assert found.prompt_end_positions[0] < starts[0, 0]


def test_every_beginning_of_a_prompt_is_refused_or_has_no_latents():
    ids = PROCESSOR.apply_chat_template(conversation(1, True), add_generation_prompt=True, tokenize=True)[0]
    first = list(ids).index(CONFIG.image_token_id)
    assert READER.read(ids[:first]).query_len == 0
    for stop in range(first + 1, len(ids)):
        with pytest.raises(ValueError, match=r"must have a latent block|perfect square|cut"):
            READER.read(ids[:stop])
    assert READER.read(ids).query_len == CONFIG.query_len


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"query_len": 9}, "`query_len` must be one of 4, 16, got 9"),
        ({"query_len": "4"}, "`query_len` must be one of 4, 16, got '4'"),
        ({"image_token_grid": 0}, "image_token_grid"),
        ({"image_token_grid": CONFIG.num_patches_per_side + 1}, "image_token_grid"),
    ],
)
def test_impossible_budgets(arguments, words):
    with pytest.raises(ValueError, match=words):
        request_budget(CONFIG, **arguments)


def test_a_budget_that_the_prompt_does_not_keep():
    ids = PROCESSOR.apply_chat_template(conversation(1, True), add_generation_prompt=True, tokenize=True)[0]
    with pytest.raises(ValueError, match="`query_len` = 4 tokens"):
        READER.read(ids).check(request_budget(CONFIG, 4))
    with pytest.raises(ValueError, match="must be 2 tokens"):
        READER.read(ids).check(request_budget(CONFIG, image_token_grid=2))
