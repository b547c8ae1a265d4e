"""Exact-match accuracy of `fusion-nano` by greedy generation, per category."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.processing_fusion import FusionProcessor
from fusion_hf.nano.training_records import NanoRecord

YES_NO = ("yes", "no")
MAX_NEW_TOKENS = 6  # the longest answer is a word of one token and its end


@torch.no_grad()
def generate_answers(
    model: FusionForConditionalGeneration,
    processor: FusionProcessor,
    records: Sequence[NanoRecord],
    images: Sequence[Image.Image] | None = None,
    query_len: int | None = None,
    batch_size: int = 64,
    image_token_grid: int | None = None,
) -> list[str]:
    """
    The answers to each record's first question.

    Args:
        images: other images to ask about, one per record; default: the records' own.
        query_len: latent tokens per question; default: the model's.
        image_token_grid: side of the grid of image tokens; default: the model's.
    """
    model.eval()
    budget: dict[str, Any] = {"query_len": query_len, "image_token_grid": image_token_grid}
    answers: list[str] = []
    for start in tqdm(range(0, len(records), batch_size), desc="evaluate", unit="batch", disable=None):
        batch = records[start : start + batch_size]
        chosen = images[start : start + batch_size] if images is not None else [r.open_image() for r in batch]
        messages = [
            [{"role": "user", "content": [{"type": "image", "image": i}, {"type": "text", "text": r.turns[0][0]}]}]
            for r, i in zip(batch, chosen, strict=True)
        ]
        inputs = processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            **budget,
        ).to(model.device)
        output = model.generate(**inputs, **budget, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def accuracies(records: Sequence[NanoRecord], answers: Sequence[str]) -> dict[str, float]:
    """Share of exact matches per category, and for easy-vqa also of yes/no and of other questions."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for record, answer in zip(records, answers, strict=True):
        expected = record.turns[0][1]
        hits[record.category].append(answer == expected)
        if record.category == "easy-vqa":
            hits["easy-vqa yes/no" if expected in YES_NO else "easy-vqa not yes/no"].append(answer == expected)
    return {name: sum(values) / len(values) for name, values in sorted(hits.items())}
