"""Exact-match accuracy of `fusion-nano` by greedy generation, per category."""

from collections import defaultdict
from collections.abc import Sequence

from PIL import Image

from fusion_hf.inference.batching import batch_generate
from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.processing_fusion import FusionProcessor
from fusion_hf.nano.training_records import NanoRecord

YES_NO = ("yes", "no")
MAX_NEW_TOKENS = 6  # the longest answer is a word of one token and its end


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
    Answer each record's first question.

    Args:
        images: other images to ask about, one per record; default: the records' own.
        query_len: latent tokens per question; default: the model's.
        image_token_grid: side of the grid of image tokens; default: the model's.
    """
    chosen = [record.open_image() for record in records] if images is None else images
    asked = [{"image": image, "question": record.turns[0][0]} for record, image in zip(records, chosen, strict=True)]
    results = batch_generate(
        asked,
        ChatModel(model.eval(), processor),
        batch_size=batch_size,
        max_new_tokens=MAX_NEW_TOKENS,
        query_len=query_len,
        image_token_grid=image_token_grid,
    )
    return [str(result["answer"]) for result in results]


def accuracies(records: Sequence[NanoRecord], answers: Sequence[str]) -> dict[str, float]:
    """Count the share of exact matches per category, and for easy-vqa also of yes/no and of other questions."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for record, answer in zip(records, answers, strict=True):
        expected = record.turns[0][1]
        hits[record.category].append(answer == expected)
        if record.category == "easy-vqa":
            hits["easy-vqa yes/no" if expected in YES_NO else "easy-vqa not yes/no"].append(answer == expected)
    return {name: sum(values) / len(values) for name, values in sorted(hits.items())}
