"""Prompts, conversations, labels and questions have the ids that the authors' preprocessing gave them."""

import json
from typing import Any

import pytest
from PIL import Image
from tests.helpers.tokenizers import write_llama3_tokenizer, write_phi3_tokenizer
from tests.parity.conftest import FIXTURES, IGNORE, IMAGE_MARK, LATENT_MARK, PROMPT_END_LABEL

from fusion_hf import FusionImageProcessor, FusionProcessor
from fusion_hf.conversion.marked_tokenizer import add_marks, load_tokenizer
from fusion_hf.training import FusionDataCollator

QUERY_LEN, MAX_LENGTH = 16, 4096
MODEL_TYPES = {"phi3": "phi3", "llama3": "llama"}
FAMILIES = {"phi_3": ("phi3", write_phi3_tokenizer), "llama_3": ("llama3", write_llama3_tokenizer)}
RECORDED = json.loads((FIXTURES / "tokenization.json").read_text())
CASES = [(family, index) for family, cases in RECORDED.items() for index in range(len(cases))]
IMAGE = Image.new("RGB", (40, 30), "teal")
MARK = object()


@pytest.fixture(scope="session")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FusionProcessor]:
    made = {}
    for family, (chat_format, write) in FAMILIES.items():
        tokenizer = load_tokenizer(write(tmp_path_factory.mktemp(family)), MODEL_TYPES[chat_format], MAX_LENGTH)
        add_marks(tokenizer, len(tokenizer) + 2)
        made[family] = FusionProcessor(FusionImageProcessor(), tokenizer, chat_format=chat_format, query_len=QUERY_LEN)
    return made


def collapse(values: list[int], ids: list[int], processor: FusionProcessor) -> list[int]:
    """Values per token with each block collapsed to one mark, and the order swap of image and first latents undone."""
    result: list[Any] = []
    marks = []
    index = 0
    while index < len(ids):
        if ids[index] == processor.image_token_id:
            marks.append(IMAGE_MARK)
            result.append(MARK)
            index += processor.num_image_tokens
        elif ids[index] == processor.latent_token_id:
            marks.append(LATENT_MARK)
            result.append(MARK)
            index += QUERY_LEN
        else:
            result.append(values[index])
            index += 1
    if IMAGE_MARK in marks:
        marks[:2] = marks[1::-1]
    ordered = iter(marks)
    return [next(ordered) if value is MARK else value for value in result]


def to_messages(case: dict[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in case["conversations"]:
        role = "user" if turn["from"] == "human" else "assistant"
        content: list[dict[str, Any]] = [{"type": "text", "text": turn["value"].replace("<image>", "")}]
        if not messages and case["has_image"]:
            content.insert(0, {"type": "image", "image": IMAGE})
        messages.append({"role": role, "content": content})
    return messages


@pytest.mark.parametrize(("family", "index"), CASES)
def test_prompt(processors: dict[str, FusionProcessor], family: str, index: int) -> None:
    case, processor = RECORDED[family][index], processors[family]
    inputs = processor.apply_chat_template(
        to_messages(case)[:1], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = inputs["input_ids"][0].tolist()
    assert collapse(ids, ids, processor) == case["inference_input_ids"]
    assert inputs["instruct_input_ids"][0].tolist() == case["inference_instruct_ids"]
    assert inputs["prompt_end_positions"].tolist() == [[len(ids) - 1]]


@pytest.mark.parametrize(("family", "index"), CASES)
def test_the_authors_prompt_text(processors: dict[str, FusionProcessor], family: str, index: int) -> None:
    """Their text has one mark per block, and the latent block before the image."""
    case, processor = RECORDED[family][index], processors[family]
    inputs = processor(text=case["inference_prompt"], images=IMAGE if case["has_image"] else None)
    ids = inputs["input_ids"][0]
    assert collapse(ids, ids, processor) == case["inference_input_ids"]
    assert inputs["instruct_input_ids"][0] == case["inference_instruct_ids"]


@pytest.mark.parametrize(("family", "index"), CASES)
def test_conversation(processors: dict[str, FusionProcessor], family: str, index: int) -> None:
    case, processor = RECORDED[family][index], processors[family]
    inputs = processor.apply_chat_template(to_messages(case), tokenize=True, return_dict=True)
    ids = inputs["input_ids"][0]
    assert collapse(ids, ids, processor) == case["input_ids"]
    assert inputs["instruct_input_ids"][0] == case["instruct_ids"]
    ends = [i for i, label in enumerate(case["labels"]) if label == PROMPT_END_LABEL]
    flags = [int(i in inputs["prompt_end_positions"][0]) for i in range(len(ids))]
    assert [i for i, flag in enumerate(collapse(flags, ids, processor)) if flag == 1] == ends


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_of_a_batch(processors: dict[str, FusionProcessor], family: str) -> None:
    processor, recorded = processors[family], RECORDED[family]
    records = [{"image": IMAGE if c["has_image"] else None, "conversations": c["conversations"]} for c in recorded]
    batch = FusionDataCollator(processor, query_lens=[QUERY_LEN])(records)
    assert batch["query_len"] == QUERY_LEN
    for index, case in enumerate(recorded):
        mask = batch["attention_mask"][index].bool()
        ids, labels = batch["input_ids"][index][mask].tolist(), batch["labels"][index][mask].tolist()
        assert collapse(ids, ids, processor) == case["input_ids"]
        expected = [IGNORE if label == PROMPT_END_LABEL else label for label in case["labels"]]
        collapsed = collapse(labels, ids, processor)
        assert [IGNORE if label in (IMAGE_MARK, LATENT_MARK) else label for label in collapsed] == expected
