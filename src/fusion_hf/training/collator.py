"""Turn records into training batches, with ids and labels as in the authors' code and a query length per batch."""

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
# replaces a batch whose records were all skipped, since every process must take part in every step
FILLER = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}
IMAGE_KEYS = ("image", "images")  # of a record
IMAGE_BLOCKS, IMAGE_FIELDS = ("image", "image_url"), ("image", "url", "path", "base64", "image_url")  # of a message


def record_to_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Convert a record to chat messages.

    The image becomes an image block of the user message that has an image mark in its text or an image block, or of
    the first user message if none has one. If several messages have a mark, the others get an image block that repeats
    the first one, as in the authors' code.

    Args:
        record: `conversations` (`[{"from", "value"}]`), `messages` (`[{"role", "content"}]`), TRL's `prompt` and
            `completion`, or FineVision's `texts` (`[{"user", "assistant"}]`). The image, if there is one, is the value
            of `image`, the only entry of `images`, or an image block.

    Returns:
        The messages, without the other fields of the record.

    Raises:
        ValueError: if there are several images, an image mark without an image, or an invalid message. The error names
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
        raise ValueError(f"{name} must have at most one image, got {len(images)}.")
    if is_marked and not images:
        raise ValueError(f"{name} has an {IMAGE_TOKEN} mark but no image.")
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
    """Return a message's content without images and marks, its images, and whether it refers to an image."""
    if isinstance(content, str):
        return content.replace(IMAGE_TOKEN, ""), [], IMAGE_TOKEN in content
    if not isinstance(content, (list, tuple)):
        return content, [], False  # `check_messages` reports this and unknown blocks
    blocks, images, has_mark = [], [], False
    for block in content:
        if not isinstance(block, dict):
            blocks.append(block)
        elif block.get("type") in IMAGE_BLOCKS:
            if role != "user":
                raise ValueError(f"{name} may have images in messages of the role 'user' only, got the role {role!r}.")
            images += images_of_block(block)
            has_mark = True
        elif isinstance(block.get("text"), str):
            has_mark |= IMAGE_TOKEN in block["text"]
            blocks.append({**block, "text": block["text"].replace(IMAGE_TOKEN, "")})
        else:
            blocks.append(block)
    return blocks, images, has_mark


def images_of_block(block: dict[str, Any]) -> list[Any]:
    """
    List the images of an image block.

    Args:
        block: a content block of a message.

    Returns:
        The images: usually one, and none if the block only marks the place of the image.
    """
    if block.get("bytes") is not None:  # the library datasets stores images as bytes with a `path` that need not exist
        return [block["bytes"]]
    return [_unwrap_url(block[key]) for key in IMAGE_FIELDS if block.get(key) is not None]


def _unwrap_url(image: Any) -> Any:
    """Return the address in OpenAI's `{"url": ...}`."""
    return image["url"] if isinstance(image, dict) and "url" in image else image


class Batch(dict[str, Any]):
    """
    A batch whose small tensors are passed from a data worker by value.

    By default, torch puts each tensor into a shared memory file, which costs both processes half a millisecond.
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

    If the records carry a `query_len`, as `StepSampler` gives it to them, it becomes that of the batch. Records that
    were `skipped` are left out. If all records of a batch were skipped, the batch is one empty conversation without
    labels.

    Args:
        processor ([`FusionProcessor`]): the processor for texts and images.
        query_lens (`Sequence[int]`, *optional*): the numbers of latent tokens, perfect squares, from which one is
            drawn for each batch; see [`BatchDraw`]. Defaults to the processor's `query_len`.
        max_length (`int`, *optional*): the maximum number of tokens. Longer conversations are truncated on the right.
            Defaults to the tokenizer's maximum.
        seed (`int`, defaults to 0): the seed of the draw.
        compact (`bool`, defaults to `False`): whether to return only what a training step needs. Images stay bytes, a
            quarter of the size of the floats that `unpack` makes of them, and the loss is computed without the logits
            of unlabelled positions.
        max_image_pixels (`int`, *optional*): the maximum number of pixels of an image. Larger images raise an error.
            Defaults to the image processor's limit.

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
        Make a batch from records.

        Args:
            records: the records, in one of the forms that `record_to_messages` accepts.

        Returns:
            The model inputs `(B, ...)`, with `labels` `(B, S)` for the answers and their end tokens, and `query_len`.
            If `compact` is set, `pixel_bytes` `(B, 5, 3, H, W)` and `has_image` `(B,)` replace `pixel_values`, and
            `loss_positions` is added (see `find_loss_positions`).

        Raises:
            ValueError: if a record is invalid, or its prompt cannot be read by the model.
        """
        kept = [record for record in records if "skipped" not in record]
        conversations = [record_to_messages(record) for record in kept or [FILLER]]
        query_len = self._query_len(records, conversations)
        texts = self.processor.apply_chat_template(conversations, query_len=query_len)
        self._check_answers(conversations, texts)
        images = [image for messages in conversations for image in images_of(messages)]
        # without rescaling, the value of a pixel depends on whether the image was given as bytes or floats
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
        """
        Return whether this collator has already checked the prompts for a model with this configuration.

        Args:
            config: the configuration of the model.

        Returns:
            Whether the model can be called with `check_inputs=False`.
        """
        names = ("image_token_id", "latent_token_id", "num_image_tokens")
        return all(getattr(self.processor, name) == getattr(config, name) for name in names)

    def unpack(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """
        Convert a compact batch to model inputs, on its device.

        Args:
            batch: a batch of this collator. One that is not compact is returned unchanged.

        Returns:
            The inputs, with `pixel_values` `(B, 5, 3, H, W)` in float32.
        """
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
        # a sample without an image is all zeros, as the processor returns it
        inputs["pixel_values"] = torch.stack(channels, dim=2).where(has_image[:, None, None, None, None], 0)
        return inputs

    def set_epoch(self, epoch: int) -> None:
        """
        Set the current epoch. In your own training loop, call this so that a resumed run draws the same query
        lengths.

        Args:
            epoch: the number of the epoch, counted from 0.
        """
        self.draw.epoch = epoch

    def _query_len(self, records: Sequence[dict[str, Any]], conversations: list[list[dict[str, Any]]]) -> int:
        given = {record["query_len"] for record in records if "query_len" in record}
        if len(given) > 1:
            raise ValueError(f"All records of a batch must have the same `query_len`, got {sorted(given)}.")
        return given.pop() if given else self.draw(conversations)

    def _check_answers(self, conversations: list[list[dict[str, Any]]], texts: list[str]) -> None:
        """
        Raise an error if a custom chat template does not enclose answers in the headers and end marks of the
        chat format.
        """
        for messages, text in zip(conversations, texts, strict=True):
            expected = sum(message["role"] == "assistant" for message in messages)
            found = len(self.answer.findall(text))
            if found != expected:
                raise ValueError(
                    f"The processor's chat template must write every answer between the assistant header and the end "
                    f"mark of `chat_format` = {self.processor.chat_format!r}, got {found} of {expected} answers "
                    "there. The others would not be learned."
                )

    def _check_prompts(self, batch: Batch) -> None:
        """Check the prompts here, in a data worker, since the model's own check would slow down the training step."""
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
        """Return `(S,)` which tokens, whose character ranges are `offsets` `(S, 2)`, begin in an answer."""
        expanded = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.processor.count_image_tokens())
        answers = [match.span() for match in self.answer.finditer(expanded)]
        first, last = np.array([(-1, -1), *answers]).T  # an empty range for tokens before the first answer
        starts, ends = offsets.T
        return (starts < last[np.searchsorted(first, starts, side="right") - 1]) & (ends > starts)


def images_of(messages: list[dict[str, Any]]) -> list[Any]:
    """
    List the images of chat messages.

    Args:
        messages: messages as `record_to_messages` returns them.

    Returns:
        The images in order.
    """
    blocks = [block for message in messages if not isinstance(message["content"], str) for block in message["content"]]
    return [block["image"] for block in blocks if block["type"] == "image" and not block.get(REPEATED)]


def find_loss_positions(labels: torch.Tensor) -> torch.Tensor:
    """
    Find the positions whose logits the loss needs, those that predict the labelled tokens.

    Most tokens belong to the image and the question, and the logits of all tokens would be the largest tensors of a
    step. The loss is the same without them.

    Args:
        labels (`(B, S)`): the labels, -100 where there is none.

    Returns:
        The positions `(M,)` in the flattened batch, the model's `loss_positions`.
    """
    has_label = labels != IGNORE_INDEX
    has_label[:, 0] = False  # no position predicts the first token of a row
    return has_label.flatten().nonzero().flatten() - 1
