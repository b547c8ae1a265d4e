"""Score a model by the share of held-out questions that it answers exactly, with greedy generation."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset
from tqdm import tqdm

from fusion_hf.model.processing_fusion import FusionProcessor
from fusion_hf.training.collator import record_to_messages
from fusion_hf.training.distributed import sum_over_ranks


def first_question(record: dict[str, Any]) -> tuple[list[dict[str, Any]], str] | None:
    """
    Split a record at its first answer.

    Args:
        record: a record as the collator accepts it.

    Returns:
        The messages before the first answer, and the answer. None if there is no answer or the record was skipped.
    """
    if "skipped" in record:
        return None
    messages = record_to_messages(record)
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            return messages[:position], text_of(message["content"]).strip()
    return None


def text_of(content: str | list[dict[str, Any]]) -> str:
    """
    Join the text blocks of a message's content.

    Args:
        content: a text or a list of content blocks.

    Returns:
        The text without images.
    """
    if isinstance(content, str):
        return content
    return "".join(block["text"] for block in content if block["type"] == "text")


@torch.no_grad()
def exact_matches(
    model: Any,
    processor: FusionProcessor,
    records: Sequence[dict[str, Any]] | IterableDataset,
    samples: int,
    batch_size: int,
    max_new_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    image_settings: dict[str, Any] | None = None,
) -> dict[str, float]:
    """
    Answer the first questions of some records and count the exact matches.

    Every process answers its share of the records. A shorter share is padded with its last record, since a sharded
    model can only generate in all processes at once.

    Args:
        model: the model.
        processor: the processor of the model.
        records: the held-out records.
        samples: how many records to use.
        batch_size: how many questions to answer at a time.
        max_new_tokens: the maximum length of an answer in tokens.
        rank: the number of this process.
        world_size: the number of processes.
        image_settings: further arguments of the image processor.

    Returns:
        `accuracy`, the share of exact answers from 0 to 1, and `answers`, the number of questions.
    """
    if isinstance(records, IterableDataset):
        records = list(islice(records, samples))
    samples = min(samples, len(records))
    own = list(range(rank, samples, world_size))
    rounds = -(-samples // world_size)
    padded = own + [own[-1] if own else 0] * (rounds - len(own))
    was_training = model.training
    model.eval()
    hits = asked = 0
    is_hidden = True if rank > 0 else None  # None shows the bar only in a terminal
    for start in tqdm(range(0, rounds, batch_size), desc="answer", unit="batch", disable=is_hidden, leave=False):
        taken = padded[start : start + batch_size]
        pairs = [first_question(records[index]) for index in taken]
        dialogs = [pair if pair is not None else ([{"role": "user", "content": ""}], "") for pair in pairs]
        inputs = processor.apply_chat_template(
            [messages for messages, _ in dialogs],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding_side": "left", **(image_settings or {})},
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for position, (pair, text) in enumerate(zip(pairs, texts, strict=True), start=start):
            if position < len(own) and pair is not None:
                asked += 1
                hits += text.strip() == pair[1]
    model.train(was_training)
    total = sum_over_ranks(torch.tensor([hits, asked], dtype=torch.float64), model.device).tolist()
    return {"accuracy": total[0] / max(total[1], 1), "answers": total[1]}
