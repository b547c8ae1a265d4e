"""Exact answers to held-out questions, by greedy generation: does the model do what the loss promises?"""

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
    """Find the messages before a record's first answer, and that answer; None if it has none or was skipped."""
    if "skipped" in record:
        return None
    messages = record_to_messages(record)
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            return messages[:position], text_of(message["content"]).strip()
    return None


def text_of(content: str | list[dict[str, Any]]) -> str:
    """Join the text of a message's content, without its image."""
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
    `accuracy`, the share of the first `samples` records whose first question is answered word for word, and `answers`,
    how many were asked.

    Every process asks its share. A share that ends earlier is filled up with its last record, since a sharded model
    generates only in all processes together. `image_settings` are of the image processor.
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
    is_hidden = True if rank > 0 else None  # None: shown where there is a terminal
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
