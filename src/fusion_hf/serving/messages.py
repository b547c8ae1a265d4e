"""Convert the messages of a request to the order that FUSION reads: a system message, then alternating questions
and answers.
"""

from dataclasses import dataclass
from typing import Any

from fusion_hf.serving.api_errors import BAD_REQUEST, ApiError, wrong_value
from fusion_hf.serving.fields import IMAGE_PART, IMAGE_URL, MESSAGE, TEXT_PART
from fusion_hf.serving.limits import MAX_IMAGES

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {SYSTEM: SYSTEM, "developer": SYSTEM, USER: USER, ASSISTANT: ASSISTANT}
TEXT, IMAGE = "text", "image_url"
BETWEEN_TEXTS = "\n\n"  # joins the texts of adjacent messages


@dataclass(frozen=True)
class Chat:
    """
    A conversation that FUSION can read.

    Args:
        messages: the messages in the format of transformers, with a block `{"type": "image"}` for the image.
        image: the data URI or address of the image.
    """

    messages: list[dict[str, Any]]
    image: str | None


@dataclass
class _Turn:
    """Adjacent messages of one role: the blocks of each message, and the indices of the first and the last one."""

    role: str
    first: int
    last: int
    contents: list[list[dict[str, Any]]]

    def join(self) -> dict[str, Any]:
        """Return one message. Several messages become their images and one text, and a single one keeps its blocks."""
        if len(self.contents) == 1:
            return {"role": self.role, "content": self.contents[0]}
        texts = ["".join(block["text"] for block in blocks if block["type"] == TEXT) for blocks in self.contents]
        images = [block for blocks in self.contents for block in blocks if block["type"] != TEXT]
        text = BETWEEN_TEXTS.join(text for text in texts if text.strip())
        return {"role": self.role, "content": [*images, {"type": TEXT, "text": text}]}


def parse_messages(given: Any, ends_with_answer: bool = False) -> Chat:
    """
    Check messages and convert them to the order that FUSION was trained on.

    Adjacent messages of one role become one message, whose texts are joined by a blank line. An image that occurs in
    several messages counts once.

    Args:
        given: the field `messages`.
        ends_with_answer: whether the last message is the beginning of an answer instead of a question.

    Returns:
        The conversation.

    Raises:
        ApiError: if a message is invalid. The message names its index, the field, the value and the allowed values.
    """
    if not isinstance(given, list) or not given:
        raise wrong_value("messages", given, "a list of at least one message")
    turns: list[_Turn] = []
    urls: dict[str, None] = {}  # in the order of their first use
    for index, message in enumerate(given):
        role, blocks = _parse_message(message, f"messages[{index}]", urls)
        if turns and turns[-1].role == role:
            turns[-1].contents.append(blocks)
            turns[-1].last = index
        else:
            turns.append(_Turn(role, index, index, [blocks]))
    if len(urls) > MAX_IMAGES:
        raise ApiError(BAD_REQUEST, f"`messages` must have at most {MAX_IMAGES} image, got {len(urls)}.", "messages")
    _check_order(turns, given, ASSISTANT if ends_with_answer else USER)
    return Chat([turn.join() for turn in turns], next(iter(urls), None))


def _check_order(turns: list[_Turn], given: list[dict[str, Any]], last_role: str) -> None:
    """Raise an `ApiError` unless questions and answers alternate after at most one system message."""
    expected = {SYSTEM, USER}
    for turn in turns:
        if turn.role not in expected:
            raise wrong_value(f"messages[{turn.first}].role", given[turn.first]["role"], _allowed_role(turn.role))
        expected = {ASSISTANT} if turn.role == USER else {USER}
    end = turns[-1]
    where = f"messages[{end.last}]"
    if end.role != last_role:
        reason = "since the last message is the question" if last_role == USER else "since the answer is continued"
        raise wrong_value(f"{where}.role", given[end.last]["role"], f"{last_role!r}, {reason}")
    if last_role == USER and not any(_has_text(block) for blocks in end.contents for block in blocks):
        raise ApiError(BAD_REQUEST, f"`{where}.content` must have a text with the question.", f"{where}.content")


def _allowed_role(role: str) -> str:
    if role == SYSTEM:
        return f"{USER!r} or {ASSISTANT!r}, since system and developer messages come before all others"
    return f"{USER!r}, since each answer must follow a question"


def _has_text(block: dict[str, Any]) -> bool:
    return block["type"] == TEXT and bool(block["text"].strip())


def _parse_message(message: Any, where: str, urls: dict[str, None]) -> tuple[str, list[dict[str, Any]]]:
    """Return the role and the blocks of a message, and add the address of a new image to `urls`."""
    if not isinstance(message, dict):
        raise wrong_value(where, message, "an object with role and content")
    given = MESSAGE.select(message, where)
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong_value(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    if role == ASSISTANT and content in (None, []):
        content = ""  # an empty answer of the assistant
    if isinstance(content, str):
        content = [{"type": TEXT, "text": content}]
    if not isinstance(content, list) or not content:
        raise wrong_value(f"{where}.content", content, "a text or a list of at least one part")
    blocks = [_parse_part(part, role, f"{where}.content[{index}]", urls) for index, part in enumerate(content)]
    kept = [block for block in blocks if block is not None]
    return ROLES[role], kept or [{"type": TEXT, "text": ""}]


def _parse_part(part: Any, role: str, where: str, urls: dict[str, None]) -> dict[str, Any] | None:
    """Return the block of a part, or None for an image that the messages have already."""
    kinds = (TEXT, IMAGE) if role == USER else (TEXT,)
    kind = part.get("type") if isinstance(part, dict) else part
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in kinds:
        raise wrong_value(f"{where}.type", kind, f"{' or '.join(kinds)} in a message of the role {role}")
    if kind == TEXT:
        return {"type": TEXT, "text": _text(TEXT_PART.select(part, where).get("text"), f"{where}.text")}
    image = IMAGE_PART.select(part, where).get(IMAGE)
    if not isinstance(image, dict):
        raise wrong_value(f"{where}.{IMAGE}", image, 'an object {"url": "..."}')
    url = _text(IMAGE_URL.select(image, f"{where}.{IMAGE}").get("url"), f"{where}.{IMAGE}.url")
    if url in urls:
        return None
    urls[url] = None
    return {"type": "image"}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise wrong_value(where, value, "a text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ApiError(BAD_REQUEST, f"`{where}` has an invalid character: {error.reason}.", where) from error
    return value
