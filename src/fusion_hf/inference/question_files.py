"""Records with questions: their formats, their file, and a digest of a set of them."""

import codecs
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from PIL import Image, ImageFile

from fusion_hf.common.errors import InputError
from fusion_hf.data.record_parsing import (
    Messages,
    Raw,
    RecordProblem,
    check_images,
    parse_json_object,
    parse_turns,
    shown_roles,
    without_marks,
)
from fusion_hf.model.chat_fusion import IMAGE_TOKEN, REPEATED
from fusion_hf.model.image_limits_fusion import ImageError
from fusion_hf.model.image_opening_fusion import load_image

QUESTION_KEYS = ("question", "messages", "conversations")
# keys of LLaVA's `question.jsonl`, read only if a record has none of ours, because other files use them for other
# texts
LLAVA_QUESTION, LLAVA_ID = "text", "question_id"
IN_MEMORY = "<image in memory>"  # stands for a PIL image while the format of a record is checked

Records: TypeAlias = Iterable[dict[str, Any]] | str | os.PathLike[str]


class Entry(NamedTuple):
    """A record as it was given, and the number of its line in a file, or None."""

    raw: Raw
    line: int | None


@dataclass(frozen=True, eq=False)
class Question:
    """A conversation that ends with a question. `image` is a path, an http(s) URL, bytes or an image."""

    id: str | int
    messages: Messages
    image: str | bytes | Image.Image | None

    def with_image(self, block: dict[str, Any] | None) -> list[dict[str, Any]]:
        """
        Return the chat messages with an image block in the questions with a mark, or in the first question.

        Args:
            block: Image block, or None for messages without an image.
        """
        messages: list[dict[str, Any]] = [dict(message) for message in self.messages]
        if block is not None:
            questions = [message for message in messages if message["role"] == "user"]
            marked = [message for message in questions if IMAGE_TOKEN in message["content"]]
            for number, message in enumerate(marked or questions[:1]):
                text = {"type": "text", "text": message["content"].replace(IMAGE_TOKEN, "")}
                message["content"] = [{"type": "image", REPEATED: True} if number else block, text]
        return messages


def read_entries(records: Records) -> tuple[list[Entry], Path]:
    """
    Read records from a JSONL file or an iterable. Empty lines are skipped.

    Args:
        records: Path of a JSONL file, or records.

    Returns:
        The records, and the folder that is the root of their relative paths: that of the file, or the current one.

    Raises:
        InputError: If the file cannot be read or is empty.
    """
    if not isinstance(records, (str, os.PathLike)):
        return [Entry(record, None) for record in records], Path()
    path = Path(records)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"The records in {path} cannot be read ({error.strerror}).") from error
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    entries = [Entry(line, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not entries:
        raise InputError(f"The records in {path} must be JSON Lines with one record per line, got an empty file.")
    return entries, path.parent


def parse_question(entry: Entry, identity: str | int) -> Question:
    """
    Parse the question of a record.

    Args:
        entry: The record.
        identity: Id for the question.

    Returns:
        The question.

    Raises:
        RecordProblem: If the record has a problem that does not require opening its image.
    """
    fields = parse_json_object(entry.raw)
    images_in_memory: list[Image.Image] = []
    if not isinstance(entry.raw, bytes):
        fields = _put_aside(fields, images_in_memory)
    given = [key for key in QUESTION_KEYS if fields.get(key) is not None]
    if not given and fields.get(LLAVA_QUESTION) is not None:
        fields, given = {**fields, "question": fields[LLAVA_QUESTION]}, ["question"]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        allowed = f"exactly one of {', '.join(QUESTION_KEYS)}"
        raise RecordProblem("shape", f"it must have {allowed}, got {found}")
    if given == ["question"]:
        if not isinstance(fields["question"], str):
            kind = type(fields["question"]).__name__
            raise RecordProblem("shape", f"`question` must be text, got {kind}")
        fields = {**fields, "messages": [{"role": "user", "content": fields["question"]}]}
    turns, images = parse_turns(fields)
    check_images(turns, images)
    messages = without_marks(turns)
    _check_order(messages)
    image = images[0] if images else None
    if image is not None and not isinstance(image, (str, bytes)):
        kind = type(image).__name__
        raise RecordProblem("shape", f"`image` must be a path, an http(s) URL, bytes or a PIL image, got {kind}")
    if image == IN_MEMORY and images_in_memory:
        return Question(identity, messages, images_in_memory[0])
    return Question(identity, messages, image)


def entry_id(entry: Entry, index: int) -> str | int:
    """
    Return the `id` or `question_id` of a record, or its index if it has none or cannot be parsed.

    Args:
        entry: The record.
        index: Index of the record.

    Raises:
        RecordProblem: If the id is neither text nor a whole number.
    """
    try:
        fields = parse_json_object(entry.raw)
    except RecordProblem:
        return index
    identity = fields.get("id") if fields.get("id") is not None else fields.get(LLAVA_ID)
    if identity is None:
        return index
    if not isinstance(identity, (str, int)) or isinstance(identity, bool):
        raise RecordProblem("shape", f"`id` must be text or a whole number, got {type(identity).__name__}")
    return identity


def digest_entries(entries: list[Entry]) -> str:
    """Return a digest that changes with any record, but not with the content of files that records name."""
    digest = hashlib.sha256()
    for raw, _ in entries:
        content = raw if isinstance(raw, bytes) else json.dumps(raw, skipkeys=True, default=_describe).encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _describe(value: Any) -> str:
    """Describe a value that is not JSON: an image by its pixels or its unread file, and bytes by a digest."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if not isinstance(value, Image.Image):
        return repr(value)
    if isinstance(value, ImageFile.ImageFile) and value.filename:
        return f"{value.filename!r} {value.size}"
    try:
        load_image(value)
        return f"{value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    except ImageError:  # a broken image is reported when it is its turn
        return f"{value.mode} {value.size}"


def _put_aside(value: Any, images: list[Image.Image]) -> Any:
    """Copy a value with `IN_MEMORY` in place of PIL images, which are appended to `images`."""
    if isinstance(value, Image.Image):
        images.append(value)
        return IN_MEMORY
    if isinstance(value, dict):
        return {key: _put_aside(item, images) for key, item in value.items()}
    return [_put_aside(item, images) for item in value] if isinstance(value, (list, tuple)) else value


def _check_order(messages: Messages) -> None:
    roles = [message["role"] for message in messages]
    conversation = roles[1:] if roles[:1] == ["system"] else roles
    if conversation != [*["user", "assistant"] * (len(conversation) // 2), "user"]:
        allowed = "user, or user, assistant, user, ... with a question at the end"
        raise RecordProblem("wrong order", f"its roles must be {allowed}, got {shown_roles(roles)}")
    if not messages[-1]["content"].replace(IMAGE_TOKEN, "").strip():
        raise RecordProblem("empty conversation", "the question is empty")
