"""Records to training batches: ids and labels as the authors' code makes them, query length drawn for each batch."""

import re
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import numpy as np
import torch

from fusion_hf.data.record_layouts import describe_missing_turns, with_known_turns
from fusion_hf.data.record_parsing import RecordProblem, llava_turns
from fusion_hf.model.chat_fusion import CHAT_FORMATS, IMAGE_TOKEN, REPEATED, as_dicts, check_messages
from fusion_hf.model.configuration_fusion import FusionConfig, TokenBudget
from fusion_hf.model.image_processing_fusion import values_of_bytes
from fusion_hf.model.input_checks_fusion import check_prompt
from fusion_hf.model.processing_fusion import FusionProcessor
from fusion_hf.training.query_lens import BatchDraw

IGNORE_INDEX = -100
SMALL_BYTES = 2**18
# stands where every record of a batch was skipped: this process must take part in the step as well
FILLER = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}
IMAGE_KEYS = ("image", "images")  # of a record
IMAGE_BLOCKS, IMAGE_FIELDS = ("image", "image_url"), ("image", "url", "path", "base64", "image_url")  # of a message


def record_to_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Read the chat messages of a record.

    The image of `image`, of `images` (a list of one, as TRL has it) or of an image block becomes an image block of the
    user message that has an image mark in its text, or an image block; of the first one, if none has. As the authors'
    code writes a block for each message with a mark, further ones get an image block that repeats the first.

    Args:
        record: `conversations` (`[{"from", "value"}]`), `messages` (`[{"role", "content"}]`), TRL's `prompt` and
            `completion` or FineVision's `texts` (`[{"user", "assistant"}]`), and an image or none.

    Returns:
        The messages, without the record's other fields.

    Raises:
        ValueError: for several images, an image mark without an image, and what a message or a turn cannot be; names
            the record, the message and the block.
    """
    name = f"Record {record.get('id')!r}"
    known = with_known_turns(record)
    if known.get("messages") is not None:
        given = as_dicts(known["messages"])
    elif known.get("conversations") is not None:
        try:
            given = [{"role": role, "content": text} for role, text in llava_turns(known["conversations"])]
        except RecordProblem as problem:
            raise ValueError(f"{name}: {problem.detail}.") from problem
    else:
        raise ValueError(f"{name}: {describe_missing_turns(record)}.")
    images = [image for key in IMAGE_KEYS for image in _as_list(record.get(key)) if image is not None]
    is_marked, marked = False, []
    messages = [dict(message) for message in given] if all(isinstance(each, dict) for each in given) else []
    for message in messages:
        message["content"], inside, has_mark = _split_content(message.get("content"), message.get("role"), name)
        images += inside
        is_marked |= has_mark
        if has_mark and message.get("role") == "user":
            marked.append(message)
    check_messages(given, f"{name}: ")
    questions = [message for message in messages if message["role"] == "user"]
    if not questions:
        raise ValueError(f"{name} has no user message.")
    if len(images) > 1:
        raise ValueError(f"{name} has {len(images)} images; allowed: one or none.")
    if is_marked and not images:
        raise ValueError(f"{name} has an {IMAGE_TOKEN} mark, but no image.")
    if images:
        for number, message in enumerate(marked or questions[:1]):
            content = message["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            image = {"type": "image", REPEATED: True} if number else {"type": "image", "image": images[0]}
            message["content"] = [image, *blocks]
    return messages


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _split_content(content: Any, role: Any, name: str) -> tuple[Any, list[Any], bool]:
    """A message's content without images and marks, its images, and whether it says that there is one."""
    if isinstance(content, str):
        return content.replace(IMAGE_TOKEN, ""), [], IMAGE_TOKEN in content
    if not isinstance(content, (list, tuple)):
        return content, [], False  # `check_messages` says what is wrong with it, and with odd blocks
    blocks, images, has_mark = [], [], False
    for block in content:
        if not isinstance(block, dict):
            blocks.append(block)
        elif block.get("type") in IMAGE_BLOCKS:
            if role != "user":
                raise ValueError(f"{name} has an image in a message of the role {role!r}; allowed: user.")
            images += images_of_block(block)
            has_mark = True
        elif isinstance(block.get("text"), str):
            has_mark |= IMAGE_TOKEN in block["text"]
            blocks.append({**block, "text": block["text"].replace(IMAGE_TOKEN, "")})
        else:
            blocks.append(block)
    return blocks, images, has_mark


def images_of_block(block: dict[str, Any]) -> list[Any]:
    """List the images of an image block; one in most cases, and none where the block only says that there is one."""
    if block.get("bytes") is not None:  # as the library datasets has it, whose `path` only names the bytes
        return [block["bytes"]]
    return [_unwrap_url(block[key]) for key in IMAGE_FIELDS if block.get(key) is not None]


def _unwrap_url(image: Any) -> Any:
    """The address in OpenAI's `{"url": ...}`."""
    return image["url"] if isinstance(image, dict) and "url" in image else image


class Batch(dict[str, Any]):
    """
    A batch whose small tensors pass from a data worker's process by value. Otherwise each of them would be a file of
    shared memory, which takes both processes half a millisecond to hand over.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, ({name: value.numpy() if _is_small(value) else value for name, value in self.items()},)


def _is_small(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.nbytes <= SMALL_BYTES


def _receive(values: dict[str, Any]) -> Batch:
    return Batch(
        (name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value) for name, value in values.items()
    )


class FusionDataCollator:
    """
    Make right-padded batches with labels from records.

    Records that carry a `query_len`, as `StepSampler`'s keys give it to them, decide the batch's. Records that were
    `skipped` are left out; a batch of nothing else becomes one empty conversation without labels.

    Args:
        processor ([`FusionProcessor`]): tokenizer and images.
        query_lens (`Sequence[int]`, *optional*): one is drawn for each batch, see [`BatchDraw`]. Default: the
            processor's `query_len`.
        max_length (`int`, *optional*): longer conversations are cut on the right; default: the tokenizer's maximum.
        seed (`int`): of the drawing.
        compact (`bool`): what a training step needs and no more. Images stay bytes, a quarter of the size of the
            numbers that `unpack` makes of them, and the loss is asked for without logits.
        max_image_pixels (`int`, *optional*): images with more are refused; default: the image processor's.

    Example:

    ```python
    >>> from fusion_hf import FusionProcessor, nano_path
    >>> from fusion_hf.training import FusionDataCollator
    >>> collator = FusionDataCollator(FusionProcessor.from_pretrained(nano_path()), query_lens=[4])
    >>> turns = [{"from": "human", "value": "what is 1 + 1?"}, {"from": "gpt", "value": "two"}]
    >>> batch = collator([{"id": "sum", "conversations": turns}])
    >>> batch["query_len"], batch["input_ids"].shape == batch["labels"].shape
    (4, True)

    ```
    """

    def __init__(
        self,
        processor: FusionProcessor,
        query_lens: Sequence[int] | None = None,
        max_length: int | None = None,
        seed: int = 0,
        compact: bool = False,
        max_image_pixels: int | None = None,
    ):
        self.processor = processor
        self.query_lens = tuple(query_lens) if query_lens is not None else (processor.query_len,)
        self.max_length = max_length if max_length is not None else processor.tokenizer.model_max_length
        self.draw = BatchDraw(self.query_lens, seed)
        self.compact = compact
        self.image_settings: dict[str, Any] = (
            {} if max_image_pixels is None else {"max_image_pixels": max_image_pixels}
        )
        chat_format = CHAT_FORMATS[processor.chat_format]
        header, end = re.escape(chat_format.assistant_header), re.escape(chat_format.turn_end)
        self.answer = re.compile(f"(?<={header})(?:.*?){end}", re.DOTALL)

    def __call__(self, records: Sequence[dict[str, Any]]) -> Batch:
        """
        Make model inputs `(B, ...)` with `labels` `(B, S)` (answers and their end tokens) and `query_len`. If compact,
        `pixel_bytes` `(B, 5, 3, H, W)` and `has_image` `(B,)` in place of `pixel_values`, and `loss_positions` (see
        `find_loss_positions`).

        Raises:
            ValueError: for records, and prompts, that the model could not read.
        """
        kept = [record for record in records if "skipped" not in record]
        conversations = [record_to_messages(record) for record in kept or [FILLER]]
        query_len = self._query_len(records, conversations)
        texts = self.processor.apply_chat_template(conversations, query_len=query_len)
        self._check_answers(conversations, texts)
        images = [image for messages in conversations for image in images_of(messages)]
        # without rescaling, what a byte becomes depends on whether the image was given in bytes or in floats
        is_compact = self.compact and self.processor.image_processor.do_rescale
        image_form: dict[str, Any] = {"as_bytes": True} if is_compact else {}
        features = self.processor(
            text=texts,
            images=images or None,
            query_len=query_len,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=True,
            **self.image_settings,
            **image_form,
        )
        for name in ("input_ids", "attention_mask"):
            features[name] = np.array(features[name])
        offsets = np.array(features.pop("offset_mapping"))  # (B, S, 2)
        is_label = np.stack([self._in_answers(*row) for row in zip(offsets, texts, strict=True)])
        is_label &= features["attention_mask"].astype(bool) & bool(kept)
        features["labels"] = np.where(is_label, features["input_ids"], IGNORE_INDEX)
        if is_compact and images:
            features["pixel_bytes"] = features.pop("pixel_values")
            features["has_image"] = [bool(images_of(messages)) for messages in conversations]
        batch = Batch(features.convert_to_tensors("pt"), query_len=query_len)
        self._check_prompts(batch)
        if self.compact:
            batch["loss_positions"] = find_loss_positions(batch["labels"])
        return batch

    def checks_for(self, config: FusionConfig) -> bool:
        """Return whether batches are checked for a model of this configuration, see its `check_inputs`."""
        names = ("image_token_id", "latent_token_id", "num_image_tokens")
        return all(getattr(self.processor, name) == getattr(config, name) for name in names)

    def unpack(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Make the model's inputs of a compact batch, on the device where it is; others stay as they are."""
        inputs = dict(batch)
        if "pixel_bytes" not in inputs:
            return inputs
        pixel_bytes, has_image = inputs.pop("pixel_bytes"), inputs.pop("has_image")
        images = self.processor.image_processor
        table = values_of_bytes(
            images.do_rescale, images.rescale_factor, images.do_normalize, images.image_mean, images.image_std
        )
        columns = torch.from_numpy(table).to(pixel_bytes.device)  # (3, 256)
        channels = [column[channel.int()] for column, channel in zip(columns, pixel_bytes.unbind(2), strict=True)]
        # zeros for a sample without an image, as the processor has them
        inputs["pixel_values"] = torch.stack(channels, dim=2).where(has_image[:, None, None, None, None], 0)
        return inputs

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, so that a loop of your own that resumes draws the numbers of one that went on."""
        self.draw.epoch = epoch

    def _query_len(self, records: Sequence[dict[str, Any]], conversations: list[list[dict[str, Any]]]) -> int:
        given = {record["query_len"] for record in records if "query_len" in record}
        if len(given) > 1:
            raise ValueError(f"The records of a batch ask for query_len {sorted(given)}; allowed: one number.")
        return given.pop() if given else self.draw(conversations)

    def _check_answers(self, conversations: list[list[dict[str, Any]]], texts: list[str]) -> None:
        """Refuse a chat template of your own that does not write the chat format's headers and ends around answers."""
        for messages, text in zip(conversations, texts, strict=True):
            expected = sum(message["role"] == "assistant" for message in messages)
            found = len(self.answer.findall(text))
            if found != expected:
                raise ValueError(
                    f"The processor's chat template writes {found} of {expected} answers between the assistant header "
                    f"and the turn's end of `chat_format` = {self.processor.chat_format!r}, so that the others would "
                    "not be learned. Write them as that format does."
                )

    def _check_prompts(self, batch: Batch) -> None:
        """Check here, in a data worker, what the model would refuse: its own check is of all samples at once."""
        pixels = batch.get("pixel_bytes", batch.get("pixel_values"))
        budget = TokenBudget(batch["query_len"], isqrt(self.processor.count_image_tokens()))
        check_prompt(
            self.processor,
            batch["input_ids"],
            batch["attention_mask"],
            pixels,
            batch.get("prompt_end_positions"),
            budget,
        )

    def _in_answers(self, offsets: np.ndarray, text: str) -> np.ndarray:
        """Which tokens, whose characters are at `offsets` `(S, 2)`, begin in an answer `(S,)`."""
        expanded = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.processor.count_image_tokens())
        answers = [match.span() for match in self.answer.finditer(expanded)]
        first, last = np.array([(-1, -1), *answers]).T  # an empty one, for what begins before any answer
        starts, ends = offsets.T
        return (starts < last[np.searchsorted(first, starts, side="right") - 1]) & (ends > starts)


def images_of(messages: list[dict[str, Any]]) -> list[Any]:
    """List the images of messages, as `record_to_messages` gives them."""
    blocks = [block for message in messages if not isinstance(message["content"], str) for block in message["content"]]
    return [block["image"] for block in blocks if block["type"] == "image" and not block.get(REPEATED)]


def find_loss_positions(labels: torch.Tensor) -> torch.Tensor:
    """
    Find where the labelled tokens of `labels` `(B, S)` are predicted: the model's `loss_positions` `(M,)`.

    The loss is the same without the logits of all other positions. Most tokens are those of the image and the
    question, and the logits of all would be the largest tensors of a step.
    """
    has_label = labels != IGNORE_INDEX
    has_label[:, 0] = False  # no position is before the first token of a row
    return has_label.flatten().nonzero().flatten() - 1
