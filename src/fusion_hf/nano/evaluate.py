"""Exact-match accuracy of `fusion-nano` with greedy decoding, per category."""

from collections import defaultdict
from collections.abc import Sequence

from PIL import Image

from fusion_hf.inference.batching import batch_generate
from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.processing_fusion import FusionProcessor
from fusion_hf.nano.training_records import NanoRecord

YES_NO = ("yes", "no")
MAX_NEW_TOKENS = 6  # the longest answer is a word of one token and the end token


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
    Answer the first question of each record.

    Args:
        model: The model.
        processor: Its processor.
        records: The records.
        images: Other images to ask about, one per record. Defaults to the images of the records.
        query_len: Number of latent tokens per question. Defaults to the model's.
        batch_size: Number of questions per batch.
        image_token_grid: Side of the grid of image tokens. Defaults to the model's.

    Returns:
        The answers.
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
    """
    Compute the share of exact matches per category, and for easy-vqa also of yes/no and of other questions.

    Args:
        records: Records with the expected answers.
        answers: Answers of the model.
    """
    hits: dict[str, list[bool]] = defaultdict(list)
    for record, answer in zip(records, answers, strict=True):
        expected = record.turns[0][1]
        hits[record.category].append(answer == expected)
        if record.category == "easy-vqa":
            hits["easy-vqa yes/no" if expected in YES_NO else "easy-vqa not yes/no"].append(answer == expected)
    return {name: sum(values) / len(values) for name, values in sorted(hits.items())}
