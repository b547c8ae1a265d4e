"""Records to training batches: ids and labels as the authors' code makes them, query length drawn for each batch."""

import random
import re
from collections.abc import Sequence
from typing import Any

from fusion_hf.processing_fusion import CHAT_FORMATS, IMAGE_TOKEN, FusionProcessor

IGNORE_INDEX = -100
# stands where every record of a batch was skipped: this process must take part in the step as well
FILLER = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}
ROLE_OF_SPEAKER = {"human": "user", "gpt": "assistant", "system": "system"}


def record_to_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """
    The chat messages of a record `{"image", "conversations": [{"from", "value"}]}` or `{"image", "messages"}`.

    The picture (path, PIL or None) becomes an image block of the first user message; image marks in LLaVA-shaped
    values are taken out.

    Raises:
        ValueError: for an unknown speaker, no user message, or an image mark without a picture.
    """
    messages = [dict(message) for message in record["messages"]] if "messages" in record else _from_llava(record)
    picture = record.get("image")
    questions = [message for message in messages if message["role"] == "user"]
    if not questions:
        raise ValueError(f"Record {record.get('id')!r} has no user message.")
    if picture is not None:
        content = questions[0]["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        questions[0]["content"] = [{"type": "image", "image": picture}, *blocks]
    return messages


def _from_llava(record: dict[str, Any]) -> list[dict[str, Any]]:
    messages = []
    for turn in record["conversations"]:
        if turn["from"] not in ROLE_OF_SPEAKER:
            allowed = ", ".join(ROLE_OF_SPEAKER)
            raise ValueError(f"Record {record.get('id')!r} has a speaker {turn['from']!r}; allowed: {allowed}.")
        if IMAGE_TOKEN in turn["value"] and record.get("image") is None:
            raise ValueError(f"Record {record.get('id')!r} has an {IMAGE_TOKEN} mark, but no image.")
        messages.append({"role": ROLE_OF_SPEAKER[turn["from"]], "content": turn["value"].replace(IMAGE_TOKEN, "")})
    return messages


class FusionDataCollator:
    """
    Makes right-padded batches with labels from records.

    Records that carry a `query_len`, as `StepSampler`'s keys give it to them, decide the batch's. Records that were
    `skipped` are left out; a batch of nothing else becomes one empty conversation without labels.

    Args:
        processor ([`FusionProcessor`]): tokenizer and pictures.
        query_lens (`Sequence[int]`, *optional*): one is drawn for each batch. Default: the processor's `query_len`.
        max_length (`int`, *optional*): longer conversations are cut on the right; default: the tokenizer's maximum.
        seed (`int`): of the drawing.
    """

    def __init__(
        self,
        processor: FusionProcessor,
        query_lens: Sequence[int] | None = None,
        max_length: int | None = None,
        seed: int = 0,
    ):
        self.processor = processor
        self.query_lens = tuple(query_lens) if query_lens is not None else (processor.query_len,)
        self.max_length = max_length if max_length is not None else processor.tokenizer.model_max_length
        self.random = random.Random(seed)
        chat_format = CHAT_FORMATS[processor.chat_format]
        header, end = re.escape(chat_format.assistant_header), re.escape(chat_format.turn_end)
        self.answer = re.compile(f"(?<={header})(?:.*?){end}", re.DOTALL)

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Model inputs `(B, ...)` with `labels` `(B, S)` (answers and their end tokens) and `query_len`."""
        query_len = self._query_len(records)
        kept = [record for record in records if "skipped" not in record]
        conversations = [record_to_messages(record) for record in kept or [FILLER]]
        texts = self.processor.apply_chat_template(conversations, query_len=query_len)
        pictures = [
            block["image"]
            for messages in conversations
            for message in messages
            if not isinstance(message["content"], str)
            for block in message["content"]
            if block["type"] == "image"
        ]
        features = self.processor(
            text=texts,
            images=pictures or None,
            query_len=query_len,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=True,
        )
        offsets = features.pop("offset_mapping")
        rows = zip(features["input_ids"], features["attention_mask"], offsets, texts, strict=True)
        features["labels"] = [self._labels(*row) if kept else [IGNORE_INDEX] * len(row[0]) for row in rows]
        return {**features.convert_to_tensors("pt"), "query_len": query_len}

    def _query_len(self, records: Sequence[dict[str, Any]]) -> int:
        given = {record["query_len"] for record in records if "query_len" in record}
        if len(given) > 1:
            raise ValueError(f"The records of a batch ask for query_len {sorted(given)}; allowed: one number.")
        return given.pop() if given else self.random.choice(self.query_lens)

    def _labels(self, ids: list[int], mask: list[int], offsets: list[tuple[int, int]], text: str) -> list[int]:
        expanded = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.processor.num_image_tokens)
        labels = [IGNORE_INDEX] * len(ids)
        spans = [match.span() for match in self.answer.finditer(expanded)]
        for index, (token, attended, (start, end)) in enumerate(zip(ids, mask, offsets, strict=True)):
            if attended and end > start and any(first <= start < last for first, last in spans):
                labels[index] = token
        return labels
