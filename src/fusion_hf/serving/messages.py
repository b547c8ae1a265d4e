"""The messages of a request, in the one order that FUSION reads: a system message, then questions and answers."""

from dataclasses import dataclass
from typing import Any

from fusion_hf.serving.api_errors import BAD_REQUEST, ApiError, wrong_value
from fusion_hf.serving.fields import IMAGE_PART, IMAGE_URL, MESSAGE, TEXT_PART
from fusion_hf.serving.limits import MAX_IMAGES

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {SYSTEM: SYSTEM, "developer": SYSTEM, USER: USER, ASSISTANT: ASSISTANT}
TEXT, IMAGE = "text", "image_url"
BETWEEN_TEXTS = "\n\n"  # of neighbouring messages that are joined


@dataclass(frozen=True)
class Chat:
    """
    A conversation that FUSION reads.

    Args:
        messages: Of the ecosystem, with a block `{"type": "image"}` in the image's place.
        image: Its data URI or address.
    """

    messages: list[dict[str, Any]]
    image: str | None


@dataclass
class _Turn:
    """Neighbouring messages of one role: the blocks of each, and the index of the first and of the last one."""

    role: str
    first: int
    last: int
    contents: list[list[dict[str, Any]]]

    def join(self) -> dict[str, Any]:
        """Return one message: of several, the images and one text; of a single one, its blocks as they are."""
        if len(self.contents) == 1:
            return {"role": self.role, "content": self.contents[0]}
        texts = ["".join(block["text"] for block in blocks if block["type"] == TEXT) for blocks in self.contents]
        images = [block for blocks in self.contents for block in blocks if block["type"] != TEXT]
        text = BETWEEN_TEXTS.join(text for text in texts if text.strip())
        return {"role": self.role, "content": [*images, {"type": TEXT, "text": text}]}


def parse_messages(given: Any, ends_with_answer: bool = False) -> Chat:
    """
    Check messages, and put them into the order that FUSION was trained on.

    Neighbours of one role become one message: their texts are joined by a blank line, their image is kept. The same
    image in several messages counts once.

    Args:
        given: The field `messages`.
        ends_with_answer: Whether the last message is an answer's beginning instead of a question.

    Returns:
        The conversation.

    Raises:
        ApiError: Names the message by its index, the field, its value and the allowed ones.
    """
    if not isinstance(given, list) or not given:
        raise wrong_value("messages", given, "a list of one or more messages")
    turns: list[_Turn] = []
    urls: dict[str, None] = {}  # in the order of their first message
    for index, message in enumerate(given):
        role, blocks = _parse_message(message, f"messages[{index}]", urls)
        if turns and turns[-1].role == role:
            turns[-1].contents.append(blocks)
            turns[-1].last = index
        else:
            turns.append(_Turn(role, index, index, [blocks]))
    if len(urls) > MAX_IMAGES:
        raise ApiError(BAD_REQUEST, f"messages have {len(urls)} images; allowed: {MAX_IMAGES}.", "messages")
    _check_order(turns, given, ASSISTANT if ends_with_answer else USER)
    return Chat([turn.join() for turn in turns], next(iter(urls), None))


def _check_order(turns: list[_Turn], given: list[dict[str, Any]], last_role: str) -> None:
    """Raise an `ApiError` unless questions and answers take turns behind at most one system message."""
    expected = {SYSTEM, USER}
    for turn in turns:
        if turn.role not in expected:
            raise wrong_value(f"messages[{turn.first}].role", given[turn.first]["role"], _allowed_role(turn.role))
        expected = {ASSISTANT} if turn.role == USER else {USER}
    end = turns[-1]
    where = f"messages[{end.last}]"
    if end.role != last_role:
        reason = "the last message is the question" if last_role == USER else "it is continued"
        raise wrong_value(f"{where}.role", given[end.last]["role"], f"{last_role!r}: {reason}")
    if last_role == USER and not any(_has_text(block) for blocks in end.contents for block in blocks):
        raise ApiError(BAD_REQUEST, f"{where}.content has no text; allowed: a question.", f"{where}.content")


def _allowed_role(role: str) -> str:
    if role == SYSTEM:
        return f"{USER!r}, {ASSISTANT!r}: system and developer messages come before all others"
    return f"{USER!r}: an answer comes after a question, and the first message that is not system is the user's"


def _has_text(block: dict[str, Any]) -> bool:
    return block["type"] == TEXT and bool(block["text"].strip())


def _parse_message(message: Any, where: str, urls: dict[str, None]) -> tuple[str, list[dict[str, Any]]]:
    """Return role and blocks; a further image's address goes to `urls`."""
    if not isinstance(message, dict):
        raise wrong_value(where, message, "an object with role and content")
    given = MESSAGE.select(message, where)
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong_value(f"{where}.role", role, ", ".join(ROLES))
    if role == ASSISTANT and content in (None, []):
        content = ""  # an assistant that said nothing
    if isinstance(content, str):
        content = [{"type": TEXT, "text": content}]
    if not isinstance(content, list) or not content:
        raise wrong_value(f"{where}.content", content, "a text, or a list of one or more parts")
    blocks = [_parse_part(part, role, f"{where}.content[{index}]", urls) for index, part in enumerate(content)]
    kept = [block for block in blocks if block is not None]
    return ROLES[role], kept or [{"type": TEXT, "text": ""}]


def _parse_part(part: Any, role: str, where: str, urls: dict[str, None]) -> dict[str, Any] | None:
    """Return the block; None for an image that the messages have already."""
    kinds = (TEXT, IMAGE) if role == USER else (TEXT,)
    kind = part.get("type") if isinstance(part, dict) else part
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in kinds:
        raise wrong_value(f"{where}.type", kind, f"{', '.join(kinds)} in a message of role {role}")
    if kind == TEXT:
        return {"type": TEXT, "text": _text(TEXT_PART.select(part, where).get("text"), f"{where}.text")}
    image = IMAGE_PART.select(part, where).get(IMAGE)
    if not isinstance(image, dict):
        raise wrong_value(f"{where}.{IMAGE}", image, 'an object: {"url": "..."}')
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
            raise ApiError(BAD_REQUEST, f"{where} has half a character: {error.reason}.", where) from error
    return value
