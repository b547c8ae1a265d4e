"""Parse a record in LLaVA's or chat layout into normalized messages, and name what is wrong with it."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from fusion_hf.common.errors import short_name
from fusion_hf.data.record_layouts import (
    TURN_KEYS,
    describe_missing_turns,
    image_rename,
    name_of_list,
    with_known_turns,
)

HUMAN, MODEL = "human", "gpt"  # speakers in LLaVA's conversations
ROLES = ("user", "assistant", "system")
ROLE_OF_SPEAKER = {HUMAN: "user", MODEL: "assistant", **{role: role for role in ROLES}}
IMAGE_KEY = "image"
FILE_NAME = "file_name"  # column of the image in the metadata of an image folder
IMAGE_TOKEN = "<image>"  # repeated from the processor, which imports transformers
# types of image blocks in messages, and their fields with the image
IMAGE_BLOCKS, BLOCK_FIELDS = ("image", "image_url"), ("image", "path", "url", "image_url")
SHOWN_ROLES = 6  # number of roles that an error shows
# what to do with broken records, and with truncated image files
OnBroken: TypeAlias = Literal["error", "skip"]
OnTruncated: TypeAlias = Literal["error", "load"]
ON_BROKEN, ON_TRUNCATED = get_args(OnBroken), get_args(OnTruncated)

ProblemKind = Literal[
    "unreadable",  # not JSON, UTF-8 or text
    "shape",  # a field is missing or has the wrong type
    "empty conversation",
    "wrong role",
    "wrong order",
    "mark without image",
    "several images",
    "path escape",
    "missing image",
    "remote image",  # at an address that is not allowed or gives no image
    "broken image",
    "oversized image",
]


class FileSpan(NamedTuple):
    """The bytes of an image inside a larger file."""

    file: Path
    offset: int
    size: int


ImageReference: TypeAlias = str | bytes | FileSpan  # a path, an encoded image, or the position of one
Messages: TypeAlias = list[dict[str, str]]


class SampleKey(NamedTuple):
    """The key that a sampler passes to a data set: the index of a record and the query length of its batch."""

    index: int  # type: ignore[assignment]  # a tuple has a method of this name
    query_len: int


class RecordProblem(Exception):
    """
    The reason why a record cannot be used for training.

    Args:
        kind: the kind of problem.
        detail: what is wrong, for users.
        identity: the id of the record if it is known.
    """

    def __init__(self, kind: ProblemKind, detail: str, identity: str | None = None):
        super().__init__(f"{kind}: {detail}")
        self.kind: ProblemKind = kind
        self.detail = detail
        self.identity = identity


Raw: TypeAlias = (
    bytes | dict[str, Any] | RecordProblem
)  # JSON text, the parsed object, or the reason why there is none


@dataclass(frozen=True)
class ParsedRecord:
    """
    A conversation that starts with a question (after an optional system message), alternates, and ends with an
    answer.

    Attributes:
        id: the id of the record.
        image: the reference to its image, or None.
        messages: the normalized messages.
        length: the number of words of all turns as they were written, image mark included, as the authors count them.
            Negative without an image, and never 0.
    """

    id: str
    image: ImageReference | None
    messages: Messages
    length: int

    @property
    def turns(self) -> int:
        """Number of questions. Each one has latent tokens."""
        return sum(message["role"] == "user" for message in self.messages)


def parse_record(raw: Raw, index: int, image_key: str = IMAGE_KEY) -> ParsedRecord:
    """
    Parse and check a record.

    Args:
        raw: JSON text, or the parsed object.
        index: the index of the record in its file, which becomes its id if it has none.
        image_key: the field that holds the image.

    Raises:
        RecordProblem: if anything is wrong that can be seen without opening the image.
    """
    identity = None
    try:
        fields = parse_json_object(raw)
        identity = str(index) if fields.get("id") is None else str(fields["id"])
        turns, images = parse_turns(fields, image_key)
        _check_turns(turns)
        check_images(turns, images)
    except RecordProblem as problem:
        problem.identity = identity
        raise
    messages = without_marks(turns)
    words = max(sum(len(text.split()) for _, text in turns), 1)
    return ParsedRecord(identity, images[0] if images else None, messages, words if images else -words)


def parse_turns(
    fields: dict[str, Any], image_key: str = IMAGE_KEY
) -> tuple[list[tuple[str, str]], list[ImageReference]]:
    """
    Read the roles and texts as they were written, and all images. Their order and number are not checked.

    Args:
        fields: the record.
        image_key: the field that holds the image.

    Returns:
        Pairs of role and text, and the references to images.

    Raises:
        RecordProblem: if a field is missing or has the wrong type.
    """
    images = _top_level_images(fields, image_key)
    known = with_known_turns(fields)
    if known.get("messages") is not None:
        turns = list(_chat_turns(known["messages"], images, image_rename(fields, image_key, is_certain=True)))
    elif known.get("conversations") is not None:
        turns = list(llava_turns(known["conversations"]))
    else:
        raise RecordProblem("shape", describe_missing_turns(fields))
    is_marked = any(IMAGE_TOKEN in text for _, text in turns)
    if not images and (rename := image_rename(fields, image_key, is_marked)) is not None:
        raise RecordProblem("shape", f"the image is in a field that is not read; {rename}")
    return turns, images


def without_marks(turns: list[tuple[str, str]]) -> Messages:
    """
    Convert turns to messages and remove image marks.

    Marks are removed from the first question, where the image is placed, and from answers. If later questions have
    marks, all questions keep theirs, since the authors' code then writes a different sequence.

    Args:
        turns: pairs of role and text.
    """
    questions = [text for role, text in turns if role == "user"]
    is_late = any(IMAGE_TOKEN in text for text in questions[1:])
    return [
        {"role": role, "content": text if is_late and role == "user" else text.replace(IMAGE_TOKEN, "")}
        for role, text in turns
    ]


def llava_record(identity: str, image: Any, turns: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """
    Make a record in LLaVA's layout, with the image mark in the first question.

    Args:
        identity: the id of the record.
        image: the path of its image.
        turns: pairs of question and answer.
    """
    conversations: list[dict[str, str]] = []
    for question, answer in turns:
        mark = "" if conversations else f"{IMAGE_TOKEN}\n"
        conversations += [{"from": HUMAN, "value": mark + question}, {"from": MODEL, "value": answer}]
    return {"id": identity, "image": image, "conversations": conversations}


def parse_json_object(raw: Raw) -> dict[str, Any]:
    """
    Parse a record as a JSON object.

    Args:
        raw: the stored record.

    Raises:
        RecordProblem: if it is not a JSON object.
    """
    if isinstance(raw, RecordProblem):
        raise raw
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RecordProblem("unreadable", f"not valid UTF-8 ({error.reason} at byte {error.start})") from error
        except (ValueError, RecursionError) as error:
            raise RecordProblem("unreadable", f"not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise RecordProblem("shape", f"the record must be a JSON object, got {_type_name(raw)}")
    return raw


def _top_level_images(fields: dict[str, Any], image_key: str) -> list[ImageReference]:
    """List the images of `image` (one or a list) and `images` (a list)."""
    images = []
    for key in (image_key, "images"):
        value = fields.get(key)
        images += [_image(item, key) for item in (value if isinstance(value, list) else [value]) if item is not None]
    return images


def _image(value: Any, key: str) -> ImageReference:
    """Accept a path, or what `datasets.Image(decode=False)` gives: `{"bytes", "path"}`."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (FileSpan, bytes)) or (isinstance(value, str) and value):
        return value
    raise RecordProblem("shape", f"`{key}` must be a path or an object with bytes and path, got {_type_name(value)}")


def llava_turns(conversations: Any) -> Iterator[tuple[str, str]]:
    """
    Read the roles and texts of LLaVA's turns `{"from", "value"}`.

    Args:
        conversations: the list of turns.

    Raises:
        RecordProblem: if it is not a list of such turns. The message names the turn.
    """
    for number, turn in enumerate(_list_of_objects(conversations, "conversations")):
        name, speaker = f"conversations[{number}]", turn.get("from")
        if not isinstance(speaker, str) or speaker not in ROLE_OF_SPEAKER:
            allowed = ", ".join(ROLE_OF_SPEAKER)
            raise RecordProblem("wrong role", f"{name}.from must be one of {allowed}, got {_repeat(speaker)}")
        yield ROLE_OF_SPEAKER[speaker], _text(turn.get("value"), f"{name}.value")


def _chat_turns(messages: Any, images: list[ImageReference], rename: str | None) -> Iterator[tuple[str, str]]:
    """
    Yield roles and texts, and add images in the first question to `images`. `rename` says where an image may be
    instead.
    """
    questions = 0
    for message in _list_of_objects(messages, "messages"):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise RecordProblem(
                "wrong role", f"the role of a message must be one of {', '.join(ROLES)}, got {_repeat(role)}"
            )
        questions += role == "user"
        if not isinstance(content, list):
            yield role, _text(content, "content")
            continue
        texts = []
        for block in _list_of_objects(content, "content"):
            if block.get("type") == "text":
                texts.append(_text(block.get("text"), "text"))
            elif block.get("type") not in IMAGE_BLOCKS:
                kind = _repeat(block.get("type"))
                raise RecordProblem(
                    "shape", f"the type of a block must be one of text, {', '.join(IMAGE_BLOCKS)}, got {kind}"
                )
            elif role != "user" or questions > 1:
                raise RecordProblem(
                    "several images", "only the first question may have an image, but a later message has one"
                )
            else:
                inside = [block[key] for key in BLOCK_FIELDS if block.get(key) is not None]
                images += [_image(_unwrap_url(value), "image") for value in inside]
                if not images:
                    advice = "" if rename is None else f"; {rename}"
                    raise RecordProblem("mark without image", f"there is an image block but no image{advice}")
        yield role, "".join(texts)


def _unwrap_url(value: Any) -> Any:
    """Return the address in OpenAI's `{"url": ...}`."""
    return value["url"] if isinstance(value, dict) and "url" in value else value


def _list_of_objects(value: Any, name: str) -> Sequence[dict[str, Any]]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, dict) for item in value):
        raise RecordProblem("shape", f"`{name}` must be a list of objects, got {_type_name(value)}")
    if name in TURN_KEYS and value and (known := name_of_list(value[0], name)) not in (None, name):
        found = short_name(", ".join(map(str, value[0])))
        raise RecordProblem("shape", f"`{name}` holds objects with {found}; rename {name!r} to {known!r}")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RecordProblem("shape", f"`{name}` must be a text, got {_type_name(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair, but tokenizers cannot encode it
            raise RecordProblem("unreadable", f"`{name}` has a lone surrogate at character {error.start}") from error
    return value


def _check_turns(turns: list[tuple[str, str]]) -> None:
    roles = [role for role, _ in turns]
    conversation = roles[1:] if roles[:1] == ["system"] else roles
    if not any(text.strip() for role, text in turns if role == "assistant"):
        raise RecordProblem("empty conversation", "no answer has a text")
    if conversation != ["user", "assistant"] * (len(conversation) // 2):
        allowed = "user, assistant, user, assistant, ..."
        if conversation[0] == "assistant":
            allowed += " (remove an answer without a question before it, as the authors' code does)"
        raise RecordProblem("wrong order", f"the roles must be {allowed}, got {shown_roles(roles)}")


def shown_roles(roles: list[str]) -> str:
    """
    Write the first roles of a conversation for an error.

    Args:
        roles: the roles.
    """
    return ", ".join(roles[:SHOWN_ROLES]) + (", ..." if len(roles) > SHOWN_ROLES else "")


def check_images(turns: list[tuple[str, str]], images: list[ImageReference]) -> None:
    """
    Check the number of images.

    Args:
        turns: pairs of role and text.
        images: the references to images.

    Raises:
        RecordProblem: if there are several images, or an image mark without an image.
    """
    if len(images) > 1:
        raise RecordProblem(
            "several images",
            f"a record must have at most one image, got {len(images)}",
        )
    if not images and any(IMAGE_TOKEN in text for _, text in turns):
        raise RecordProblem("mark without image", f"there is an {IMAGE_TOKEN} mark but no image")


def _type_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _repeat(value: Any) -> str:
    return short_name(repr(value))
